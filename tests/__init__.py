"""What a user relies on, a file for each promise; the folders are the rooms of the package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
