"""The package layout; everything else is declared in pyproject.toml.

The Triton kernels live in `kernels/` and are imported as `tokensel_kernels`. That folder must stay without an
`__init__.py`: a regular package called `kernels` on `sys.path`, where the root of every checkout is, would
shadow the Hugging Face package of that name and break `import transformers` for people who have it.
`tests/cli/test_packaging.py` guards this.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tokensel*"]), "tokensel_kernels"],
    package_dir={"tokensel_kernels": "kernels"},
    package_data={
        "tokensel": ["py.typed", "report/page.html"],
        "tokensel_kernels": ["tiles.json", "rates.json", "estimates.json"],
    },
)
