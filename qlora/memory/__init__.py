"""Memory of a run: forecasts, measurements, plans for a budget and advice."""
