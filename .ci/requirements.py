"""Prints pyproject.toml's dependencies for pip, or what their newest releases mean for the upper bounds.

.ci/requirements.py oldest                         the lowest version of each that is admitted: constraints
.ci/requirements.py newest [--hold NAME ...]       each without its upper bound, tests' own too: requirements
.ci/requirements.py beyond                         the installed versions that lie beyond their bound
.ci/requirements.py tested                         the installed version of each and of what they need: constraints
"""

import argparse
import datetime
import platform
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
UPPER = {"<", "<=", "==", "~="}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["oldest", "newest", "beyond", "tested"])
    parser.add_argument("--hold", metavar="NAME", action="append", default=[], help="keep this upper bound")
    arguments = parser.parse_args()
    held = {canonicalize_name(name) for name in arguments.hold}
    if unknown := held - {canonicalize_name(wanted.name) for wanted in needed("test")}:
        parser.error(f"--hold: pyproject.toml does not ask for {', '.join(sorted(unknown))}")
    lines = {
        "oldest": lambda: [oldest(wanted) for wanted in needed()],
        "newest": lambda: [newest(wanted, held) for wanted in needed("test")],
        "beyond": lambda: [found for wanted in needed("test") if (found := beyond(wanted))],
        "tested": lambda: [*heading(), *sorted(tested(needed("tensorboard", "export", "serve")))],
    }
    for line in lines[arguments.what]():
        print(line)


def needed(*extras: str) -> list[Requirement]:
    """Return the requirements of the package and of these extras; an extra can include others."""
    return [*map(Requirement, PROJECT["dependencies"]), *(line for extra in extras for line in added(extra))]


def added(extra: str) -> Iterator[Requirement]:
    """Yield the requirements of an extra and of the extras that it includes."""
    for wanted in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if canonicalize_name(wanted.name) == canonicalize_name(PROJECT["name"]):
            for other in wanted.extras:
                yield from added(other)
        else:
            yield wanted


def oldest(wanted: Requirement) -> str:
    """The lowest admitted version: `>=2.11` is `==2.11.*`, a lower bound of three numbers is that release."""
    (lowest,) = (clause.version for clause in wanted.specifier if clause.operator == ">=")
    return f"{wanted.name}=={lowest}" + (".*" if lowest.count(".") < 2 else "")


def newest(wanted: Requirement, held: set[str]) -> str:
    """The requirement without its upper bound, unless its name is in `held`."""
    if canonicalize_name(wanted.name) not in held:
        wanted.specifier = SpecifierSet(
            ",".join(str(clause) for clause in wanted.specifier if clause.operator not in UPPER)
        )
    return str(wanted)


def beyond(wanted: Requirement) -> str | None:
    """The requirement and the installed version, if that one lies outside; None if it is admitted."""
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:  # its marker excludes this machine
        return None
    if wanted.specifier.contains(installed, prereleases=True):
        return None
    return f"{wanted.name} {installed} lies outside {wanted.specifier}"


def heading() -> list[str]:
    """The comment above the tested versions: machine, Python and date."""
    return [
        "# Versions that passed all tests together; `.ci/tested` wrote this file. Install exactly these with",
        "#     pip install -c constraints.txt -e .",
        f"# {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"{datetime.date.today():%Y-%m-%d}",
    ]


def tested(wanted: list[Requirement]) -> set[str]:
    """The installed versions of these requirements, of theirs and so on, as `name==version`.

    A local version such as torch's `+cpu` is left out, because it names a build and not a release.
    """
    found: dict[str, str] = {}
    waiting = [(requirement, "") for requirement in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for chosen in ("", *requirement.extras):
            if f"{name}[{chosen}]" not in found:
                found[f"{name}[{chosen}]"] = f"{name}=={version(name).partition('+')[0]}"
                waiting += [(Requirement(line), chosen) for line in requires(name) or ()]
    return set(found.values())


if __name__ == "__main__":
    main()
