"""`heads`: how differently the attention heads of trained models attend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from mhe_lightning.checkpoint import run_of
from mhe_lightning.comparison.diversity import diversity_of_text, maps_of_text
from mhe_lightning.comparison.heads_plot import plot_diversity, plot_maps
from mhe_lightning.comparison.results import AttentionMaps, LayerDiversity
from mhe_lightning.comparison.style import figure_bytes, require_matplotlib
from mhe_lightning.errors import UserError
from mhe_lightning.files import write_bytes, write_text
from mhe_lightning.loading import add_use_arguments, lines_of_file, lines_of_stdin, load_trained
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.parsing import Parser, as_user_error

MODELS = (Decoder, Encoder, EncoderDecoder)

Diversity = Mapping[str, Sequence[LayerDiversity]]


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    try:
        if options.out is not None:
            require_matplotlib()
        names = _names(options.runs)
        lines = lines_of_file(options.text) if options.text else [*lines_of_stdin("a text, then Ctrl-D:")]
        diversity: dict[str, list[LayerDiversity]] = {}
        maps: dict[str, AttentionMaps] = {}
        for name, run in zip(names, options.runs, strict=True):
            net, tokenizer, _ = load_trained(
                Namespace(**vars(options), run_or_ckpt=run), MODELS, "this package's models have heads to look at"
            )
            diversity[name] = diversity_of_text(
                net, tokenizer, lines, max_tokens=options.max_tokens, batch_size=options.batch_size
            )
            if options.out is not None:
                maps[name] = maps_of_text(net, tokenizer, lines)
        print("\n".join(table(diversity)))
        if options.out is not None:
            _write(Path(options.out), options, diversity, maps)
    except ValueError as error:
        raise as_user_error(error) or error from error


def table(diversity: Diversity) -> list[str]:
    """Lines of a table: a row per place and layer, two columns per run."""
    rows = list(dict.fromkeys((entry.place, entry.layer) for found in diversity.values() for entry in found))
    order = list(dict.fromkeys(place for place, _ in rows))
    rows.sort(key=lambda row: (order.index(row[0]), row[1]))
    widths = [max(17, len(name)) for name in diversity]
    lines = [
        "".join([" " * 14, *(f"  {name:>{width}}" for name, width in zip(diversity, widths, strict=True))]),
        "".join([f"{'place':7}  layer", *(f"  {'JS (bits)':>{width - 8}}  cosine" for width in widths)]),
    ]
    for place, layer in rows:
        cells = []
        for found, width in zip(diversity.values(), widths, strict=True):
            entry = next((e for e in found if (e.place, e.layer) == (place, layer)), None)
            divergence, cosine = ("–", "–") if entry is None else (f"{entry.jensen_shannon:.4f}", f"{entry.cosine:.4f}")
            cells.append(f"  {divergence:>{width - 8}}  {cosine:>6}")
        lines.append(f"{place:7}  {layer:5}{''.join(cells)}")
    return lines


def _write(folder: Path, options: Namespace, diversity: Diversity, maps: Mapping[str, AttentionMaps]) -> None:
    runs = {
        name: {"run": run, "layers": [asdict(entry) for entry in diversity[name]]}
        for name, run in zip(diversity, options.runs, strict=True)
    }
    record = {
        "text": "standard input" if options.text is None else options.text,
        "max_tokens": options.max_tokens,
        "ckpt_path": options.ckpt_path,
        "runs": runs,
    }
    write_text(folder / "heads.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    figure = plot_diversity(diversity)
    write_bytes(folder / "heads.png", figure_bytes(figure, "png"))
    write_bytes(folder / "heads.svg", figure_bytes(figure, "svg"))
    for place, layer in dict.fromkeys(key for found in maps.values() for key in found.layers):
        having = {name: found for name, found in maps.items() if (place, layer) in found.layers}
        write_bytes(folder / f"maps-{place}-layer{layer}.png", figure_bytes(plot_maps(having, layer, place), "png"))
    print(f"written to {folder}")


def _names(runs: Sequence[str]) -> list[str]:
    """A name for each run: its folder's, or the path as given where these are not different."""
    if len(set(runs)) < len(runs):
        raise UserError(f"{next(run for run in runs if runs.count(run) > 1)} is given twice; give each run once")
    names = [run_of(Path(run))[0].resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


def _parser() -> Parser:
    parser = Parser(
        prog="train.py heads",
        description="How differently the attention heads of trained models attend on a text: for each layer the mean "
        "Jensen-Shannon divergence of two heads' attention (0: all attend alike, 1: no two to one same token) and "
        "their cosine similarity. An encoder-decoder reads each line and its own translation of it.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="Run directories or checkpoint files.")
    parser.add_argument("--text", type=str, help="A text file (default: standard input).")
    parser.add_argument("--max_tokens", type=int, default=4096, help="Tokens of the text to look at.")
    parser.add_argument(
        "--out", type=str, help="A folder for heads.json, heads.png, heads.svg, and maps of the text's first tokens."
    )
    add_use_arguments(parser)
    return parser
