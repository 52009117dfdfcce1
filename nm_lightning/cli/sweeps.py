"""A Weights & Biases sweep file as flags, so that the same grid runs here, in one process, without W&B."""

from pathlib import Path

from nm_lightning.errors import InputError


def flags_of(path: Path) -> list[str]:
    """The flags of all values of all parameters, each list as one flag with several words.

    Raises:
        InputError: no sweep file, or one whose parameters are ranges to draw from.
    """
    import yaml

    try:
        parameters = yaml.safe_load(path.read_text())["parameters"].items()
    except OSError as error:
        raise InputError(f"sweep {str(path)!r} can't be read ({error.strerror}): name one of configs/sweeps") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"sweep {str(path)!r} is no sweep file: it needs parameters, as configs/sweeps has") from error
    flags = []
    for name, content in parameters:
        content = content if isinstance(content, dict) else {}
        values = content.get("values", [content["value"]] if "value" in content else None)
        if not isinstance(values, list):
            raise InputError(f"sweep {str(path)!r}: parameter {name} needs values: [...] or value: ...")
        if values != [False]:
            flags += [f"--{name}", *(str(value) for value in values if value is not True)]
    return flags
