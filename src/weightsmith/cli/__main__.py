"""``python -m weightsmith.cli``, for launchers that start a module."""

from weightsmith.cli import main

if __name__ == "__main__":
    main()
