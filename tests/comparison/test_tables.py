"""Tables of comparisons and their renderings against text that was worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mhe_lightning.comparison.overview import multi_task_table
from mhe_lightning.comparison.results import Comparison, Estimate, Metric, Variant
from mhe_lightning.comparison.statistics import elasticities, estimate, paired_test, retained
from mhe_lightning.comparison.tables import RENDERERS, Column, Table, render
from mhe_lightning.comparison.task_table import comparison_table
from mhe_lightning.data.glue import TASKS as GLUE_TASKS

PPL = Metric("ppl", higher_is_better=False)
ACCURACY = Metric("accuracy", higher_is_better=True, unit=100)
SCORE = Metric("score", higher_is_better=True, unit=100)
F1 = Metric("f1", higher_is_better=True)
BLEU = Metric("bleu", higher_is_better=True)

T1 = math.tan(0.475 * math.pi)
"""t(0.975) with one degree of freedom, 12.7062: half the width of an interval of 0 and 2."""

PARAMETERS = {"mha": 400, "mqa": 200, "sha": 100}
INTERVAL = "± is the 95 % interval of the mean over seeds (Student's t)."
OVER_TASKS = "PRR and PEoP are computed per seed and task, then averaged over tasks, then over seeds."


def compare(task, metric, scores, *, parameters=PARAMETERS, extra=None, notes=(), split="val") -> Comparison:
    """Of ``scores`` by variant and seed; ``extra`` has further fields of some variants."""
    reference, baseline = scores.get("mha", {}), scores.get("sha", {})
    variants = [
        Variant(
            name=name,
            scores=own,
            score=estimate(list(own.values())),
            retained=retained(own, reference, metric),
            efficiency=elasticities(own, baseline, parameters[name], parameters.get("sha", 1), metric),
            p_value=paired_test(own, reference),
            attention_parameters=parameters[name],
            parameters=1000 + parameters[name],
            tokens_per_second=None,
            peak_memory_bytes=None,
            cache_bytes_per_token=None,
        )
        for name, own in scores.items()
    ]
    if extra:
        variants = [replace(variant, **extra.get(variant.name, {})) for variant in variants]
    return Comparison(task, split, metric, "mha", "sha", "equal_architecture", variants, notes=notes)


def columns(table: Table) -> dict[str, list[str]]:
    return {column.title: [row[i] for row in table.rows] for i, column in enumerate(table.columns)}


def read_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(table, "csv"), newline="")))


# --- renderings of a small table


SMALL = Table(
    "Losses",
    [Column("name"), Column("loss", "right", "in nats", ("loss", "loss_half_width"))],
    [["mha", "1.25 ± 0.50"], ["a|b", "–"]],
    ["A note."],
    [["mha", 1.2512345678901233, 0.5], ["a|b", None, None]],
)


def test_text_is_aligned():
    assert render(SMALL, "text") == (
        "Losses\n\nname         loss\n----  -----------\nmha   1.25 ± 0.50\na|b             –\n\nA note.\n"
    )


def test_text_is_aligned_by_the_width_of_its_characters():
    # each of the two characters takes two columns, the combining accent none
    table = Table("x", [Column("n"), Column("m")], [["注意", "1"], ["e\u0301", "2"], ["abcd", "3"]])

    assert render(table, "text") == "x\n\nn     m\n----  -\n注意  1\ne\u0301     2\nabcd  3\n"


def test_markdown_escapes_pipes():
    assert render(SMALL, "markdown") == (
        "Losses\n\n| name | loss |\n| :-- | --: |\n| mha | 1.25 ± 0.50 |\n| a\\|b | – |\n\n- A note.\n"
    )


def test_markdown_escapes_what_would_be_markup_and_joins_lines():
    table = Table("x", [Column("n")], [["a\\|*b*\n<br> < 1"]])

    assert render(table, "markdown").splitlines()[-1] == r"| a\\\|\*b\* \<br> < 1 |"


def test_csv_has_the_unrounded_numbers():
    text = render(SMALL, "csv")

    assert text == "name,loss,loss_half_width\r\nmha,1.2512345678901233,0.5\r\na|b,,\r\n"
    assert float(read_csv(SMALL)[0]["loss"]) == 1.2512345678901233


def test_csv_quotes_what_needs_it():
    table = Table("x", [Column("a"), Column("b")], [["", ""]], values=[['say "x", y', "two\nlines"]])

    assert render(table, "csv") == 'a,b\r\n"say ""x"", y","two\nlines"\r\n'
    assert read_csv(table) == [{"a": 'say "x", y', "b": "two\nlines"}]


def test_csv_of_a_table_without_values_has_its_texts():
    assert render(Table("x", [Column("a")], [["1"]]), "csv") == "a\r\n1\r\n"


def test_latex_is_a_booktabs_table():
    assert render(SMALL, "latex") == "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            r"\caption{Losses}",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"name & loss \\",
            r"\midrule",
            r"mha & 1.25 $\pm$ 0.50 \\",
            r"a\textbar{}b & -- \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\footnotesize",
            "A note.",
            r"\end{table}",
            "",
        ]
    )


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("50 %", r"50 \%"),
        ("mhe_add & #1 $x$", r"mhe\_add \& \#1 \$x\$"),
        ("{a}~b^c\\d", r"\{a\}\textasciitilde{}b\textasciicircum{}c\textbackslash{}d"),
        ("< 0.001", "$<$ 0.001"),
        ("-0.50 ± 0.10", r"$-$0.50 $\pm$ 0.10"),
        ("wikitext-2-v1", "wikitext-2-v1"),
        ("× 2", r"$\times$ 2"),
    ],
)
def test_latex_special_characters(text, latex):
    line = render(Table("x", [Column("a")], [[text]]), "latex").splitlines()[8]

    assert line == latex + r" \\"


def test_html_is_a_table_with_heads_and_classes():
    assert render(SMALL, "html") == "\n".join(
        [
            "<table>",
            "<caption>Losses</caption>",
            "<thead>",
            '<tr><th scope="col">name</th><th scope="col" class="num" title="in nats">loss</th></tr>',
            "</thead>",
            "<tbody>",
            '<tr><th scope="row">mha</th><td class="num">1.25 ± 0.50</td></tr>',
            '<tr><th scope="row">a|b</th><td class="num">–</td></tr>',
            "</tbody>",
            "<tfoot>",
            '<tr><td colspan="2">A note.</td></tr>',
            "</tfoot>",
            "</table>",
            "",
        ]
    )


def test_html_escapes_texts():
    table = Table('<i>"', [Column("<b>", description='"x"'), Column("&")], [["<script>", "&amp;"]])
    text = render(table, "html")

    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.feed(text)
    assert [data for data in found if data.strip()] == ['<i>"', "<b>", "&", "<script>", "&amp;"]
    assert 'title="&quot;x&quot;"' in text


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="must be one of text, markdown, csv, latex, html"):
        render(SMALL, "pdf")


@pytest.mark.parametrize(
    ("rows", "values"), [([["a"]], ()), ([["a", "b"]], [["a"]]), ([["a", "b"]], [["a", "b"], ["c", "d"]])]
)
def test_a_table_of_uneven_rows_is_refused(rows, values):
    with pytest.raises(ValueError, match="give"):
        Table("x", [Column("a"), Column("b")], rows, values=values)


@pytest.mark.parametrize("kind", RENDERERS)
def test_every_kind_renders_tables_without_notes_and_rows(kind):
    assert render(Table("x", [Column("a")], []), kind).endswith("\n")


# --- one task

WIKITEXT = compare(
    "wikitext-2-v1",
    PPL,
    {"mha": {1: 20.0, 2: 22.0}, "mqa": {1: 22.0, 2: 22.0}, "sha": {1: 25.0, 2: 25.0}},
    notes=["A note of its own."],
    extra={
        "mha": dict(
            tokens_per_second=Estimate(12345.6, 78.9, 2),
            peak_memory_bytes=Estimate(512 * 2**20, 2**20, 2),
            cache_bytes_per_token=4800,
            latency={128: 0.001, 512: 0.002},
        ),
        "mqa": dict(
            tokens_per_second=Estimate(2000.0, None, 1),
            peak_memory_bytes=None,
            cache_bytes_per_token=400,
            latency={128: 0.001, 512: 0.0015, 1024: 0.01},
            settings={"model.init_args.lr": 0.001, "trainer.max_steps": 10},
        ),
        "sha": dict(cache_bytes_per_token=7200, latency={512: 0.00125}),
    },
)


def test_a_comparison_against_strings_by_hand():
    table = comparison_table(WIKITEXT)

    assert table.caption == "wikitext-2-v1 (val): ppl, lower is better; equal architecture"
    assert columns(table) == {
        "attention": ["mha", "mqa", "sha"],
        "seeds": ["2", "2", "2"],
        # half widths: 12.7062 times half the difference of the two seeds
        "ppl": ["21.00 ± 12.71", "22.00 ± 0.00", "25.00 ± 0.00"],
        # mqa: 1 - 2/20 = 0.9 and 1 - 0/22 = 1: 0.95 ± 12.7062 * 0.05
        # sha: 1 - 5/20 = 0.75 and 1 - 3/22 = 0.863636: 0.806818 ± 12.7062 * 0.0568182
        "PRR %": ["100.0", "95.0 ± 63.5", "80.7 ± 72.2"],
        # mha: (1 - 20/25) / 3 = 0.066667 and (1 - 22/25) / 3 = 0.04: 0.053333 ± 12.7062 * 0.0133333
        # mqa: (1 - 22/25) / 1 twice
        "PEoP": ["0.053 ± 0.169", "0.120 ± 0.000", "–"],
        # mqa: differences 2 and 0, t = 1, p = 1 - 2 atan(1) / pi; sha: 5 and 3, t = 4, p = 1 - 2 atan(4) / pi
        "p": ["–", "0.500", "0.156"],
        # sha: 2 * 0.155958; mqa: 0.5
        "p, Holm": ["–", "0.500", "0.312"],
        "attention parameters": ["400 (100.0 %)", "200 (50.0 %)", "100 (25.0 %)"],
        "all parameters": ["1,400", "1,200", "1,100"],
        "tokens/s": ["12,346 ± 79", "2,000", "–"],
        "peak memory MiB": ["512 ± 1", "–", "–"],
        # the only length that all three have
        "ms/token at 512": ["2.00", "1.50", "1.25"],
        "cache bytes/token": ["4,800 (1/1)", "400 (1/12)", "7,200 (× 1.5)"],
        "settings": ["–", "lr=0.001, max_steps=10", "–"],
    }
    assert list(table.notes) == [
        INTERVAL,
        "Means are over n = 2 seeds.",
        "p is of the two-sided paired t-test over seeds against mha, for 2 comparisons.",
        "A note of its own.",
    ]


def test_the_csv_of_a_comparison_reads_back_unrounded():
    mha, mqa, sha = read_csv(comparison_table(WIKITEXT))

    assert list(mha) == [
        *("attention", "seeds", "ppl", "ppl_half_width", "prr_percent", "prr_percent_half_width"),
        *("peop", "peop_half_width", "p", "p_holm", "attention_parameters", "attention_parameters_percent"),
        *("parameters", "tokens_per_second", "tokens_per_second_half_width", "peak_memory_mib"),
        *("peak_memory_mib_half_width", "decode_ms_per_token_at_512", "cache_bytes_per_token", "cache_share"),
        "settings",
    ]
    assert float(mha["ppl_half_width"]) == WIKITEXT.variants[0].score.half_width == pytest.approx(T1)
    assert float(sha["prr_percent"]) == pytest.approx((75 + 100 * 19 / 22) / 2, rel=1e-14)
    assert float(sha["p"]) == WIKITEXT.variants[2].p_value
    assert (mha["prr_percent"], mha["prr_percent_half_width"], mha["p"], sha["peop"]) == ("100.0", "", "", "")
    assert (mha["tokens_per_second"], mha["peak_memory_mib"], mqa["cache_share"]) == ("12345.6", "512.0", str(1 / 12))
    assert json.loads(mqa["settings"]) == {"model.init_args.lr": 0.001, "trainer.max_steps": 10}


def test_columns_without_any_data_are_left_out():
    table = comparison_table(compare("sst2", ACCURACY, {"mha": {1: 0.9}, "mqa": {1: 0.81}}))

    assert columns(table) == {
        "attention": ["mha", "mqa"],
        "seeds": ["1", "1"],
        "accuracy %": ["90.00", "81.00"],
        "PRR %": ["100.0", "90.0"],
        "attention parameters": ["400 (100.0 %)", "200 (50.0 %)"],
        "all parameters": ["1,400", "1,200"],
    }
    assert list(table.notes) == ["Scores are of n = 1 seed."]
    assert list(read_csv(table)[0])[2:4] == ["accuracy_percent", "accuracy_percent_half_width"]


def test_what_is_undefined_is_a_dash():
    # a reference of 0: neither its own retention nor that of others is defined
    table = comparison_table(compare("cola", ACCURACY, {"mha": {1: 0.0}, "mqa": {1: 0.1}, "sha": {1: 0.05}}))

    assert "PRR %" not in columns(table)
    assert columns(table)["PEoP"] == ["-0.333", "1.000", "–"]  # (0 / 0.05 - 1) / 3, (0.1 / 0.05 - 1) / 1


def test_a_small_p_and_different_numbers_of_seeds():
    # differences 1 and 1.001: t = 2001, p = 1 - 2 atan(2001) / pi = 2 / (2001 pi) = 0.0003
    table = comparison_table(compare("x", BLEU, {"mha": {1: 20.0, 2: 20.0}, "mqa": {1: 21.0, 2: 21.001, 3: 20.0}}))

    assert columns(table)["p"] == ["–", "< 0.001"]
    assert table.notes[1:] == [
        "Means are over n = 2 to 3 seeds.",
        "p is of the two-sided paired t-test over seeds against mha, for 1 comparison.",
    ]


def test_settings_of_one_last_name_are_told_apart():
    settings = {"mha": dict(settings={"a.lr": 1, "b.lr": 2}), "mqa": dict(settings={"a.lr": 3})}
    table = comparison_table(compare("x", BLEU, {"mha": {1: 20.0}, "mqa": {1: 21.0}}, extra=settings))

    assert columns(table)["settings"] == ["a.lr=1, b.lr=2", "a.lr=3"]


def test_lengths_that_have_nothing_in_common_fall_back_to_the_longest():
    latency = {"mha": dict(latency={128: 0.001}), "mqa": dict(latency={1024: 0.002})}
    table = comparison_table(compare("x", BLEU, {"mha": {1: 20.0}, "mqa": {1: 21.0}}, extra=latency))

    assert columns(table)["ms/token at 1,024"] == ["–", "2.00"]


def test_without_the_reference_there_are_no_shares_of_it():
    table = comparison_table(compare("x", BLEU, {"mqa": {1: 21.0}}, extra={"mqa": dict(cache_bytes_per_token=400)}))

    assert columns(table) == {
        "attention": ["mqa"],
        "seeds": ["1"],
        "bleu": ["21.00"],
        "attention parameters": ["200"],
        "all parameters": ["1,200"],
        "cache bytes/token": ["400"],
    }


# --- several tasks

# two seeds that differ by 0.02 and 0.04, whose half widths are 12.7062 * 0.01 and 0.02, and perplexities without spread
SST2 = compare("glue-sst2", ACCURACY, {"mha": {1: 0.90, 2: 0.92}, "mqa": {1: 0.81, 2: 0.92}, "sha": {1: 0.6, 2: 0.8}})
PTB = compare("ptb", PPL, {"mha": {1: 20.0, 2: 20.0}, "mqa": {1: 22.0, 2: 22.0}, "sha": {1: 25.0, 2: 25.0}})
RTE = compare("glue-rte", ACCURACY, {"mha": {1: 0.50, 2: 0.52}, "mqa": {1: 0.50, 2: 0.52}, "sha": {1: 0.4, 2: 0.4}})


def test_several_tasks_against_strings_by_hand():
    table = multi_task_table([SST2, PTB, RTE])

    assert table.caption == "Scores by task (val)"
    assert columns(table) == {
        "attention": ["mha", "mqa", "sha"],
        # half widths: 12.7062 times half the difference of the two seeds, 1, 5.5 and 10
        "glue-sst2 accuracy %": ["91.00 ± 12.71", "86.50 ± 69.88", "70.00 ± 127.06"],
        "glue-rte accuracy %": ["51.00 ± 12.71", "51.00 ± 12.71", "40.00 ± 0.00"],
        # by seed: mha 70 and 72, mqa 65.5 and 72, sha 50 and 60
        "GLUE average of 2": ["71.00 ± 12.71", "68.75 ± 41.30", "55.00 ± 63.53"],
        "ptb ppl": ["20.00 ± 0.00", "22.00 ± 0.00", "25.00 ± 0.00"],
        "attention parameters": ["400 (100.0 %)", "200 (50.0 %)", "100 (25.0 %)"],
        # mqa: (0.9 + 0.9 + 1) / 3 and (1 + 0.9 + 1) / 3: 0.95 ± 12.7062 * 0.0166667
        # sha: (0.6667 + 0.75 + 0.8) / 3 = 0.738889 and (0.869565 + 0.75 + 0.769231) / 3 = 0.796265:
        # 0.767577 ± 12.7062 * 0.028688
        "PRR %": ["100.0", "95.0 ± 21.2", "76.8 ± 36.5"],
        # mha, a third of: 0.5, 0.2, 0.25 (seed 1), 0.15, 0.2, 0.3 (seed 2): means 0.105556 and 0.072222
        # mqa: 0.35, 0.12, 0.25 (seed 1), 0.15, 0.12, 0.3 (seed 2): means 0.24 and 0.19
        "PEoP": ["0.089 ± 0.212", "0.215 ± 0.318", "–"],
    }
    assert list(table.notes) == [INTERVAL, "Means are over n = 2 seeds.", OVER_TASKS]
    first = read_csv(table)[0]
    assert float(first["glue_average_of_2"]) == pytest.approx(71, rel=1e-14)
    assert float(first["glue-sst2_accuracy_percent_half_width"]) == pytest.approx(T1, rel=1e-12)


def test_groups_stand_together_and_squad_keeps_its_unit():
    v1 = compare("squad-v1", F1, {"mha": {1: 88.0}})
    v2 = compare("squad-v2", F1, {"mha": {1: 76.0}})
    boolq = compare("superglue-boolq", SCORE, {"mha": {1: 0.7}})
    wmt = compare("wmt14", BLEU, {"mha": {1: 27.3}})
    table = multi_task_table([v1, wmt, boolq, v2])

    assert columns(table) == {
        "attention": ["mha"],
        "squad-v1 f1": ["88.00"],
        "squad-v2 f1": ["76.00"],
        "SQuAD average of 2": ["82.00"],
        "wmt14 bleu": ["27.30"],
        "superglue-boolq score %": ["70.00"],  # an average of one would repeat it
        "attention parameters": ["400 (100.0 %)"],
        "PRR %": ["100.0"],
    }


def all_of_glue(metric=SCORE) -> list[Comparison]:
    # scores 0.1 to 0.9, whose mean is 0.5, and a diagnostic of 0
    averaged = [task for task, spec in GLUE_TASKS.items() if spec.averaged]
    scores = {task: (i + 1) / 10 for i, task in enumerate(averaged)} | {"ax": 0.0}
    return [compare(f"glue-{task}", metric, {"mha": {1: score}}) for task, score in scores.items()]


def test_the_average_of_the_complete_benchmark_leaves_out_its_diagnostics():
    table = multi_task_table(all_of_glue())

    assert len(GLUE_TASKS) == 10
    assert columns(table)["GLUE average"] == ["50.00"]
    assert [column.title for column in table.columns][10:12] == ["glue-ax score %", "GLUE average"]
    assert list(table.notes) == [
        "Scores are of n = 1 seed.",
        "PRR leaves out glue-ax, where it is not defined for every variant.",
        "PEoP is not defined for every variant in any task.",
        OVER_TASKS,
    ]


def test_diagnostics_do_not_count_in_the_average_of_some_tasks_either():
    *_, rte, _, ax = all_of_glue()

    table = multi_task_table([rte, SST2, ax])

    assert "GLUE average of 2" in columns(table)


def test_a_note_tells_that_an_average_is_not_of_the_official_scores():
    # of these tasks accuracy is not the only metric, or there are two parts
    notes = multi_task_table(all_of_glue(ACCURACY)).notes

    tasks = "glue-cola, glue-mrpc, glue-stsb, glue-qqp, glue-mnli"
    assert f"The GLUE average is of the metrics shown, which are not the official scores of {tasks}." in notes


def test_averages_are_of_the_seeds_that_all_tasks_have():
    # seed 2 alone: (40 + 80) / 2
    one = compare("glue-rte", SCORE, {"mha": {1: 0.2, 2: 0.4}})
    other = compare("glue-sst2", SCORE, {"mha": {2: 0.8, 3: 0.9}})

    table = multi_task_table([one, other])

    assert columns(table)["GLUE average of 2"] == ["60.00"]
    assert columns(table)["PRR %"] == ["100.0"]


def test_a_variant_that_lacks_a_task_has_no_averages():
    table = multi_task_table([SST2, replace(RTE, variants=[v for v in RTE.variants if v.name != "mqa"])])
    found = columns(table)

    assert found["attention"] == ["mha", "mqa", "sha"]
    for title in ("glue-rte accuracy %", "GLUE average of 2", "PRR %", "PEoP"):
        assert found[title][1] == "–"
        assert found[title][0] != "–"
    assert found["glue-sst2 accuracy %"][1] == "86.50 ± 69.88"


def test_a_task_where_retention_is_undefined_is_left_out_for_all_variants():
    # the reference's Matthews correlation is 0 with one seed; PEoP is defined there, and counted
    cola = compare("glue-cola", ACCURACY, {"mha": {1: 0.0, 2: 0.1}, "mqa": {1: 0.1, 2: 0.1}, "sha": {1: 0.1, 2: 0.1}})
    alone, table = multi_task_table([RTE]), multi_task_table([RTE, cola])

    assert columns(table)["PRR %"] == columns(alone)["PRR %"]
    # mqa: PEoP of RTE 0.25 and 0.3, of CoLA 0: means 0.125 and 0.15
    assert columns(table)["PEoP"][1] == "0.138 ± 0.159"
    assert "PRR leaves out glue-cola, where it is not defined for every variant." in table.notes
    assert not any("PEoP leaves out" in note for note in table.notes)


def test_a_task_where_elasticity_is_undefined_is_left_out_for_all_variants():
    cola = compare("glue-cola", ACCURACY, {"mha": {1: 0.2, 2: 0.1}, "mqa": {1: 0.1, 2: 0.1}, "sha": {1: 0.0, 2: 0.1}})
    alone, table = multi_task_table([RTE]), multi_task_table([RTE, cola])

    assert columns(table)["PEoP"] == columns(alone)["PEoP"]
    assert "PEoP leaves out glue-cola, where it is not defined for every variant." in table.notes


def test_attention_parameters_that_differ_between_tasks_are_left_out():
    smaller = {"mha": 40, "mqa": 20, "sha": 10}
    scores = {"mha": {1: 20.0}, "mqa": {1: 22.0}, "sha": {1: 25.0}}

    table = multi_task_table([RTE, compare("ptb", PPL, scores, parameters=smaller)])

    assert "attention parameters" not in columns(table)
    assert columns(table)["PEoP"][1] == "0.185"  # (0.25 + 0.12) / 2, of seed 1


def test_splits_that_differ_are_in_the_titles():
    table = multi_task_table([RTE, replace(PTB, split="test")])

    assert table.caption == "Scores by task (test, val)"
    assert {"glue-rte accuracy % (val)", "ptb ppl (test)"} <= columns(table).keys()


def test_notes_name_their_tasks_unless_they_are_of_all():
    table = multi_task_table([replace(RTE, notes=["Of all.", "Of one."]), replace(PTB, notes=["Of all."])])

    assert list(table.notes)[-2:] == ["Of all.", "glue-rte: Of one."]


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ([], "at least one"),
        ([RTE, RTE], "glue-rte has several"),
        ([RTE, replace(PTB, reference="mqa")], "the same reference, not mha and mqa"),
        ([RTE, replace(PTB, baseline="mqa")], "the same baseline, not mqa and sha"),
    ],
)
def test_comparisons_that_do_not_fit_together_are_refused(comparisons, message):
    with pytest.raises(ValueError, match=message):
        multi_task_table(comparisons)


@pytest.mark.parametrize("kind", RENDERERS)
@pytest.mark.parametrize("table", [comparison_table(WIKITEXT), multi_task_table([SST2, PTB])], ids=["one", "several"])
def test_every_kind_shows_every_row(kind, table):
    text = render(table, kind)

    assert all(name in text for name in PARAMETERS)
    assert "?" not in text
