"""The quality grid: its cells, its splits and its table. Training itself is tested elsewhere."""

from pathlib import Path

from scripts.quality import METHODS, TASKS, Setup, all_runs, files_of, hold_out, table


def row(method, seed, score):
    cell = {"task": "SST-2", "method": method, "seed": seed, "score": score}
    return cell | {"trainable_parameters": 296066, "cpu_seconds": 100.0 + seed}


def test_every_cell_is_run_once():
    runs = list(all_runs())
    assert len(runs) == len(set(runs)) == 27


def test_held_out_rows_choose_and_do_not_train(tmp_path):
    folder = tmp_path / "cola"
    folder.mkdir()
    rows = [f"text {n}\tacceptable" for n in range(25)]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    setup = Setup(Path("base"), tmp_path, tmp_path / "work", "float32")
    hold_out(setup)
    fit, choose, reported = files_of(TASKS["CoLA"], setup)
    fitted, chosen = (path.read_text().splitlines() for path in (fit, choose))
    assert fitted[0] == chosen[0] == "text\tlabel"
    assert chosen[1:] == [rows[0], rows[10], rows[20]]
    assert sorted(fitted[1:] + chosen[1:]) == sorted(rows)
    assert reported == folder / "dev.tsv"


def test_table_has_mean_and_deviation_of_what_is_finished():
    lora, none, _ = METHODS
    text = table([row(lora, 0, 0.88), row(lora, 1, 0.9), row(none, 0, 0.875)])
    assert text.splitlines()[2:] == [
        "| SST-2 | accuracy × 100, test | LoRA | 89.0 ± 1.4 | 296,066 | 100 | 2 |",
        "| SST-2 | accuracy × 100, test | MoLEx, gate gradient none | 87.5 | 296,066 | 100 | 1 |",
    ]
