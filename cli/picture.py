"""Pictures, where matplotlib is installed."""

from pathlib import Path

from fast.files import replacing


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, path: Path):
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format=path.suffix[1:])
    import_pyplot().close(figure)  # which keeps all that are open
