"""Pictures of reports in one style, by matplotlib, which comes with the extra [plot]."""

from contextlib import contextmanager

from qexport._swap import check_file, whole_file
from qexport.arguments import as_path
from qexport.errors import QexportError, UsageError

KINDS = (".png", ".svg", ".pdf")
COLOURS = ("#1f4e9c", "#c0392b", "#2e8b57", "#8e44ad", "#d9822b", "#17807e", "#7f9f3f")
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}


def check_plot(file) -> None:
    """Whether a picture can be drawn to `file`, before anything is measured for it.

    Raises:
        UsageError: not a kind of picture that is drawn here, a folder that is not there, or one in the file's place.
        QexportError: the folder takes no new files, or matplotlib is not installed.
    """
    path = as_path("plot", file)
    if path.suffix not in KINDS:
        raise UsageError(f"{path}: a plot ends in {', '.join(KINDS)}")
    check_file(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise QexportError("a plot needs matplotlib: pip install 'qexport[plot]'") from None


@contextmanager
def figure_in(file, size: tuple[float, float]):
    """Yields a figure of `size`, in inches, and writes it to `file` on a normal exit.

    Raises:
        QexportError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            with whole_file(file) as whole:
                figure.savefig(whole, dpi=100)
        except OSError as error:
            raise QexportError(f"{file}: the plot cannot be written: {error.strerror}") from error
