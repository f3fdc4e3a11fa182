"""What `prepare` costs, against what a user would write instead, and how far the loader is ahead of a training step.

    python benchmarks/prepare.py --out docs/results/prepare_cpu.json

All read one parquet file (Python's own prose with words exchanged, or `--path`) and have the same tokenizer and cores:

* prepare: our `prepare`, without and with documents held out (and so without duplicates);
* bare: `encode_batch_fast` of batches of as much text, and the ids into a memory map; nothing is counted or hashed;
* datasets: `load_dataset`, `map` with `encode_batch_fast`, `map` with `group_texts` of nothing but ids, on all cores;
* datasets, transformers: the same as language-modelling scripts have it, with a `PreTrainedTokenizerFast`, which also
  gives attention masks, and labels copied from the ids (and no end-of-text tokens).

Each run is a process of its own, interleaved; CPU time is user and system time of it and its children after its
imports; memory is the largest sum over them of what is theirs (PSS), looked up ten times a second, and beside it what
it was before the work began: our package brings torch along. That the tokens are those of the bare run is checked.
`--limit_mb` packs a corpus that is larger than a limit on the memory that the process may have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer

ROW_GROUP = 10_000
BATCH_BYTES = 128_000  # as in prepare; the bare run, too, is slower with much larger ones
SAMPLING_S = 0.1
BARE, LEAN, USUAL = "bare", "datasets", "datasets, transformers"
REFERENCES = (USUAL, LEAN, BARE)
CANDIDATES = ("prepare", "prepare, held out", BARE, LEAN, USUAL)


# --- the candidates: each runs in a process of its own and returns tokens and their hash


def packed(corpus: Path, tokenizer: Path, folder: Path, held_out: float, **_: Any) -> Callable[[], dict[str, Any]]:
    from mhe_lightning.data.corpus import CorpusSpec, prepare

    spec = CorpusSpec(str(corpus), tokenizer=str(tokenizer), validation_fraction=held_out)

    def run() -> dict[str, Any]:
        done = prepare(spec, folder, progress=False)
        entry = done.manifest["splits"]["train"]
        tokens = sum(one["tokens"] for one in done.manifest["splits"].values())
        whole = len(entry["shards"]) == 1
        return {"tokens": tokens, "text_bytes": entry["bytes"], "sha256": entry["shards"][0]["sha256"] if whole else ""}

    return run


def bare(corpus: Path, tokenizer: Path, folder: Path, **_: Any) -> Callable[[], dict[str, Any]]:
    encoder = Tokenizer.from_file(str(tokenizer))
    end = end_of_text(encoder)
    size = pyarrow.parquet.ParquetFile(corpus).metadata
    most = sum(size.row_group(i).total_byte_size for i in range(size.num_row_groups)) + size.num_rows + 1

    def run() -> dict[str, Any]:
        out = np.memmap(folder / "tokens.bin", dtype="<u2", mode="w+", shape=(most,))
        out[0] = end
        count = 1
        for texts in in_bytes(rows_of(corpus), BATCH_BYTES):
            ids: list[int] = []
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                ids += encoding.ids
                ids.append(end)
            out[count : count + len(ids)] = ids
            count += len(ids)
        out.flush()
        return {"tokens": count, "sha256": lambda: hashlib.sha256(out[:count].tobytes()).hexdigest()}

    return run


def mapped(
    corpus: Path, tokenizer: Path, folder: Path, processes: int, block_length: int, usual: bool = False, **_: Any
) -> Callable[[], dict[str, Any]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    import datasets

    datasets.disable_progress_bars()
    tokenize = usual_tokenize(tokenizer) if usual else lean_tokenize(tokenizer)

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {name: list(chain(*column)) for name, column in rows.items()}
        total = len(joined["input_ids"]) // block_length * block_length
        starts = range(0, total, block_length)
        blocks = {name: [tokens[i : i + block_length] for i in starts] for name, tokens in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()} if usual else blocks

    def run() -> dict[str, Any]:
        data = datasets.load_dataset("parquet", data_files=str(corpus), cache_dir=str(folder), split="train")
        data = data.map(tokenize, batched=True, num_proc=processes, remove_columns=["text"])
        data = data.map(group_texts, batched=True, num_proc=processes)
        return {"tokens": len(data) * block_length}

    return run


def lean_tokenize(tokenizer: Path) -> Callable[[dict[str, list[str]]], dict[str, Any]]:
    encoder = Tokenizer.from_file(str(tokenizer))
    end = end_of_text(encoder)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        encodings = encoder.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, end] for encoding in encodings]}

    return tokenize


def usual_tokenize(tokenizer: Path) -> Callable[[dict[str, list[str]]], Any]:
    from transformers import PreTrainedTokenizerFast

    encoder = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    return lambda rows: encoder(rows["text"], return_token_type_ids=False)


MAKERS: dict[str, Callable[..., Callable[[], dict[str, Any]]]] = {
    "prepare": partial(packed, held_out=0.0),
    "prepare, held out": partial(packed, held_out=0.05),
    BARE: bare,
    LEAN: mapped,
    USUAL: partial(mapped, usual=True),
}


def run_one(options: argparse.Namespace) -> None:
    """Run one candidate in this process; print what it took."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = MAKERS[options.candidate](
            corpus=options.corpus,
            tokenizer=options.tokenizer,
            folder=Path(folder),
            processes=options.processes,
            block_length=options.block_length,
        )
        if options.limit_mb:
            limit = options.limit_mb * 10**6
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        before = memory_of_tree(os.getpid())
        begun, cpu = time.perf_counter(), cpu_seconds()
        result = run()
        measured = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - begun, "cpu_of_imports": cpu}
        if callable(result.get("sha256")):
            result["sha256"] = result["sha256"]()
        print(json.dumps({**result, **measured, "bytes_before": before}))


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def end_of_text(tokenizer: Tokenizer) -> int:
    """Of the tokenizer; an assertion, as the package, which knows better, is not imported for the peers."""
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    return end


# --- the corpus


def rows_of(corpus: Path) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(corpus) as parquet:
        for batch in parquet.iter_batches(1000, columns=["text"]):
            yield from batch.column("text").to_pylist()


def in_bytes(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Texts in lists of about ``size`` characters."""
    batch: list[str] = []
    total = 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def varied(documents: list[str], size: int) -> Iterator[str]:
    """Numbered documents of ``size`` characters together, one word in twenty exchanged; ``size`` 0 gives them once."""
    if not size:
        yield from documents
        return
    draw = random.Random(0)
    words = " ".join(documents).split()
    total = number = 0
    while total < size:
        parts = draw.choice(documents).split(" ")
        for _ in range(len(parts) // 20):
            parts[draw.randrange(len(parts))] = draw.choice(words)
        text = f"{number} {' '.join(parts)}"
        yield text
        total += len(text)
        number += 1


def write_corpus(file: Path, texts: Iterable[str]) -> int:
    """A parquet file of ``texts``; returns their bytes."""
    schema = pyarrow.schema({"text": pyarrow.string()})
    total = 0
    with pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        texts = iter(texts)
        while part := list(islice(texts, ROW_GROUP)):
            total += sum(len(text.encode()) for text in part)
            writer.write_table(pyarrow.table({"text": part}, schema))
    return total


# --- measuring


def measure(options: argparse.Namespace, corpus: Path, candidate: str, limit_mb: int = 0) -> dict[str, Any]:
    """Run a candidate in a fresh process and look at its memory meanwhile.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, __file__, "--candidate", candidate, "--corpus", str(corpus)]
    for name in ("tokenizer", "folder", "processes", "block_length"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--limit_mb", str(limit_mb)]
    # Arrow's own allocator holds a gigabyte of addresses in reserve, which count for the limit with nothing in them.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"} if limit_mb else None
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(SAMPLING_S)
        out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{candidate} failed: {err.strip()}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**result, "peak_bytes": peak}


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and its descendants hold, what they share counted once (PSS); 0 for those that are gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = {child for task in tasks for child in (task / "children").read_text().split()}
    except (OSError, ProcessLookupError):
        return 0
    return own + sum(memory_of_tree(int(child)) for child in children)


def compare_preparing(options: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """All candidates, interleaved."""
    from common import compared, interleaved, quartiles

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.candidates}

    def candidate(name: str) -> Callable[[], None]:
        return lambda: runs[name].append(measure(options, corpus, name))

    interleaved({name: candidate(name) for name in runs}, rounds=options.rounds)
    runs = {name: measured[1:] for name, measured in runs.items()}  # the first round warms the disk's cache
    hashes = {name: {run["sha256"] for run in runs[name]} for name in ("prepare", BARE) if name in runs}
    if len(set().union(*hashes.values())) > 1:
        raise RuntimeError(f"prepare and the bare run gave different tokens: {hashes}")
    cpu = {name: [run["cpu"] for run in measured] for name, measured in runs.items()}
    rows: dict[str, Any] = {}
    for name, measured in runs.items():
        rows[name] = {"tokens": measured[0]["tokens"], "cpu_seconds": quartiles(cpu[name])}
        for reference in REFERENCES:
            if reference in runs:
                rows[name][f"cpu_times_{reference}"] = compared(cpu, reference)[name][f"times_{reference}"]
        rows[name]["wall_seconds"] = quartiles([run["wall"] for run in measured])
        rows[name]["tokens_per_cpu_second"] = quartiles([run["tokens"] / run["cpu"] for run in measured])
        rows[name]["peak_bytes"] = quartiles([run["peak_bytes"] for run in measured])
        rows[name]["bytes_before"] = quartiles([run["bytes_before"] for run in measured])
        rows[name]["cpu_seconds_of_imports"] = quartiles([run["cpu_of_imports"] for run in measured])
    return rows


def limited(options: argparse.Namespace, documents: list[str]) -> dict[str, Any]:
    """Pack a corpus that is larger than the memory that the process may have."""
    corpus = options.folder / "larger.parquet"
    size = write_corpus(corpus, varied(documents, round(1.1e6 * options.limit_mb)))
    run = measure(options, corpus, "prepare", options.limit_mb)
    return {
        "limit_bytes": options.limit_mb * 10**6,
        "text_bytes": size,
        "tokens": run["tokens"],
        "peak_bytes": run["peak_bytes"],
    }


def compare_loading(options: argparse.Namespace, corpus: Path) -> list[dict[str, Any]]:
    """The training loader, as `fit` has it, and steps of a small decoder on the batches' shape, interleaved."""
    import torch
    from common import interleaved, quartiles

    from mhe_lightning.attention import MHE
    from mhe_lightning.data import CorpusSpec, LanguageModelingData
    from mhe_lightning.models import Decoder

    torch.set_num_threads(options.processes)
    results = []
    for rows, length in options.batches:
        spec = CorpusSpec(str(corpus), tokenizer=str(options.tokenizer))
        data = LanguageModelingData(
            spec, length, batch_size=rows, seed=0, document_mask=options.document_mask, cache_dir=str(options.folder)
        )
        data.prepare()
        batches = iter(data.train_dataloader())
        net = Decoder(data.vocab_size, MHE, width=128, n_heads=4, n_layers=2, max_length=length, dropout=0.0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        batch = next(batches)

        def load(batches: Iterator[Any] = batches) -> None:
            for _ in range(options.loads):
                next(batches)

        def step(net: Any = net, optimizer: Any = optimizer, batch: Any = batch) -> None:
            net.loss(net(batch["tokens"]), batch["targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = interleaved({"load": load, "step": step}, rounds=options.rounds)
        loads = [taken / options.loads for taken in seconds["load"]]
        results.append(
            {
                "rows": rows,
                "length": length,
                "loaded_rows_per_second": quartiles([rows / taken for taken in loads]),
                "loaded_tokens_per_second": quartiles([rows * length / taken for taken in loads]),
                "step_tokens_per_second": quartiles([rows * length / taken for taken in seconds["step"]]),
                "times_step": quartiles([s / load for s, load in zip(seconds["step"], loads, strict=True)]),
            }
        )
    return results


# --- the report


def table_of(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    from common import markdown_table

    def spread(entry: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
        low, high = entry["quartiles"]
        return f"{entry['median'] / scale:,.{digits}f} ({low / scale:,.{digits}f}–{high / scale:,.{digits}f})"

    text = ""
    if rows := results.get("preparing"):
        references = [name for name in REFERENCES if name in rows]
        head = ["", "CPU s", *(f"× {name}" for name in references), "wall s", "peak MB", "before MB", "tokens / CPU s"]
        text += markdown_table(
            head,
            [
                [
                    name,
                    spread(row["cpu_seconds"]),
                    *(spread(row[f"cpu_times_{reference}"]) for reference in references),
                    spread(row["wall_seconds"]),
                    spread(row["peak_bytes"], 1e6, 0),
                    spread(row["bytes_before"], 1e6, 0),
                    spread(row["tokens_per_cpu_second"], digits=0),
                ]
                for name, row in rows.items()
            ],
        )
    if bound := results.get("limited"):
        text += (
            f"\nWith at most {bound['limit_bytes'] / 1e6:,.0f} MB of data (RLIMIT_DATA), `prepare` packed "
            f"{bound['text_bytes'] / 1e6:,.0f} MB of text into {bound['tokens']:,} tokens; its peak was "
            f"{bound['peak_bytes'] / 1e6:,.0f} MB.\n"
        )
    if loading := results.get("loading"):
        text += "\n" + markdown_table(
            ["batch", "loaded rows/s", "loaded tokens/s", "tokens/s of a step", "loader × step"],
            [
                [
                    f"{row['rows']} × {row['length']}",
                    spread(row["loaded_rows_per_second"], digits=0),
                    spread(row["loaded_tokens_per_second"], digits=0),
                    spread(row["step_tokens_per_second"], digits=0),
                    spread(row["times_step"], digits=0),
                ]
                for row in loading
            ],
        )
    return text


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="embedded", help="source of documents, as `data.corpus.path`")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--megabytes", type=float, default=20, help="of text, by variation; 0: the source once")
    parser.add_argument(
        "--tokenizer", type=Path, help="with <|endoftext|>; a BPE of 8,192 tokens is trained if not given"
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted; 0 leaves this out")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--processes", type=int, default=cores, help="of datasets.map; all cores if not given")
    parser.add_argument("--block_length", type=int, default=512, help="tokens of group_texts")
    parser.add_argument("--limit_mb", type=int, default=0, help="limit of data in a run on a larger corpus; 0: no run")
    parser.add_argument("--batches", nargs="*", type=shape, default=[(16, 128), (16, 1024)], help="such as 16x128")
    parser.add_argument("--loads", type=int, default=50, help="batches that are loaded for each step")
    parser.add_argument("--document_mask", action="store_true", help="load documents too")
    parser.add_argument("--folder", type=Path, help="for files; a temporary one if not given")
    parser.add_argument("--out", type=Path, help="JSON file to write, and a Markdown table beside it")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def shape(text: str) -> tuple[int, int]:
    """Rows and tokens of "16x128"."""
    rows, length = map(int, text.split("x"))
    return rows, length


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(given)
    if options.candidate:
        run_one(options)
        return {}
    from common import description, peer, save

    from mhe_lightning.data.sources import open_source
    from mhe_lightning.data.tokenizer import train_tokenizer

    if USUAL in options.candidates:
        peer("transformers", "pip install 'mhe-lightning[hf]'")
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        source = open_source(options.path, text_column=options.text_column)
        documents = [piece.text for piece in source.pieces("train")]
        corpus = options.folder / "corpus.parquet"
        size = write_corpus(corpus, varied(documents, round(options.megabytes * 1e6)))
        if options.tokenizer is None:
            options.tokenizer = options.folder / "tokenizer.json"
            train_tokenizer(documents, "bpe", 8192).save(str(options.tokenizer))
        results: dict[str, Any] = {"text_bytes": size}
        peers = ["transformers"] if USUAL in options.candidates else []
        about = description("tokenizers", "datasets", "pyarrow", "numpy", *peers)
        # files of this run only are not a setting
        settings = argparse.Namespace(**{**vars(options), "tokenizer": options.tokenizer.name, "folder": None})
        for name, wanted, part in (
            ("preparing", options.rounds, partial(compare_preparing, options, corpus)),
            ("limited", options.limit_mb, partial(limited, options, documents)),
            ("loading", options.batches, partial(compare_loading, options, corpus)),
        ):
            if wanted:
                results[name] = part()
                save(settings, about, table_of, **results)
    print(table_of(results), end="")
    return results


if __name__ == "__main__":
    main()
