"""``python -m extractor`` is the command ``extract``."""

from extractor.cli.main import process

if __name__ == "__main__":
    raise SystemExit(process())
