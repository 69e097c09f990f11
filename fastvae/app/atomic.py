"""Files that are written whole or not at all: those of the library, under the name that the app uses."""

from fastvae._files import whole_file, write_json

__all__ = ["whole_file", "write_json"]
