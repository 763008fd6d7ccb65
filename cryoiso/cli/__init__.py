"""The command line: words only. Every command is a small module; the work is done by the layers below."""
