"""What pyproject.toml cannot say.

setuptools leaves data files out of editable installs because it asks the distribution for `has_data`, and the method is
called `has_data_files`. The launchers of `crbd compat-path` are data files.
"""

from setuptools import Distribution, setup


class WithData(Distribution):
    """A distribution that answers to both names."""

    def has_data(self) -> bool:
        """Whether there are data files."""
        return bool(self.has_data_files())


setup(distclass=WithData)
