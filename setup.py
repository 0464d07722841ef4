"""Says which packages there are; everything else is in pyproject.toml.

`kernels/` lies at the top level and is installed as `fastdit.kernels`. It has no `__init__.py` (see CONTRIBUTING.md),
so no package finder sees it and it is named here.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), "fastdit.kernels"],
    package_dir={"fastdit.kernels": "kernels"},
)
