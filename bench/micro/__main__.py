from bench import common, micro
from qexport import _core


def main():
    arguments = common.parser(micro.__doc__.split("\n")[0]).parse_args()
    peaks, rows = micro.results()
    common.report("micro", 1, {"isa": _core.isa()}, {"peaks": micro.peak_rows(peaks), "kernels": rows}, arguments.json)


if __name__ == "__main__":
    main()
