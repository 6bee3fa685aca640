"""Print pyproject.toml's dependencies for pip, or the installed versions that are above their upper bound.

.ci/requirements.py oldest                         constraints: the lowest allowed version of each dependency
.ci/requirements.py newest [--hold NAME ...]       requirements without upper bounds, including those of the tests
.ci/requirements.py beyond                         installed versions outside their bounds
"""

import argparse
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
UPPER = {"<", "<=", "==", "~="}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["oldest", "newest", "beyond"])
    parser.add_argument("--hold", metavar="NAME", action="append", default=[], help="keep this upper bound")
    arguments = parser.parse_args()
    held = {canonicalize_name(name) for name in arguments.hold}
    if unknown := held - {canonicalize_name(wanted.name) for wanted in needed("test")}:
        parser.error(f"--hold: pyproject.toml does not ask for {', '.join(sorted(unknown))}")
    lines = {
        "oldest": lambda: [oldest(wanted) for wanted in needed()],
        "newest": lambda: [newest(wanted, held) for wanted in needed("test")],
        "beyond": lambda: [outside for wanted in needed("test") if (outside := beyond(wanted))],
    }
    for line in lines[arguments.what]():
        print(line)


def needed(*extras: str) -> list[Requirement]:
    """Return the requirements of the package and of these extras."""
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in groups for line in lines]


def oldest(wanted: Requirement) -> str:
    """Pin a requirement to its lower bound: `>=2.11` becomes `==2.11.*`, `>=2.11.1` becomes `==2.11.1`."""
    (lowest,) = (clause.version for clause in wanted.specifier if clause.operator == ">=")
    return f"{wanted.name}=={lowest}" + (".*" if lowest.count(".") < 2 else "")


def newest(wanted: Requirement, held: set[str]) -> str:
    """Return the requirement without its upper bound, unless its name is in `held`."""
    if canonicalize_name(wanted.name) not in held:
        wanted.specifier = SpecifierSet(
            ",".join(str(clause) for clause in wanted.specifier if clause.operator not in UPPER)
        )
    return str(wanted)


def beyond(wanted: Requirement) -> str | None:
    """Describe an installed version outside the requirement's bounds; return None if it is within them."""
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:  # the requirement's marker excludes this machine
        return None
    if wanted.specifier.contains(installed, prereleases=True):
        return None
    return f"{wanted.name} {installed} is outside {wanted.specifier}"


if __name__ == "__main__":
    main()
