"""Reports of a run: report.html, memory tables and pictures, pictures of adapter spectra."""
