"""Bad input: the argument, what came, what is allowed, what to do; no traceback, exit code 2."""

import pytest

CASES = {
    "unknown command": (["comparre"], r"Unknown command \"comparre\".*Did you mean \"compare\""),
    "unknown option": (["compare", "--lenght", "5"], r"Unknown option: --lenght.*--length"),
    "not a number": (["compare", "--length", "abc"], r"--length.*\"abc\".*int.*--help"),
    "length 0": (["compare", "--length", "0"], r"--length: 0 came\. Allowed: 2 or more.*4096"),
    "length 1": (["compare", "--length", "1"], r"--length: 1 came\. Allowed: 2 or more"),
    "negative length": (["compare", "--length=-5"], r"--length: -5 came\. Allowed: 2 or more"),
    "unknown mechanism": (
        ["compare", "--attention", "windw:window=3"],
        r"'windw'.*Did you mean 'window'.*Allowed: .*exact,",
    ),
    "unknown setting": (
        ["compare", "--attention", "window:windw=3"],
        r"windw.*Did you mean 'window'.*num_sinks",
    ),
    "bad setting": (["compare", "--attention", "window:window=0"], r"window is 0.*>= 1"),
    "setting of a wrong type": (
        ["compare", "--attention", "window:window=many"],
        r"window.*'many'.*int",
    ),
    "no such device": (
        ["compare", "--text", "{book}", "--model", "{folder}", "--device", "cuda:77"],
        r"--device: 'cuda:77' came.*Allowed: cpu.*Leave --device out",
    ),
    "missing text": (
        ["compare", "--text", "{tmp}/none.txt", "--model", "{folder}"],
        r"text: '.*none\.txt' is neither a file.*Allowed: .*great-exp",
    ),
    "an empty folder as text": (
        ["compare", "--text", "{empty}", "--model", "{folder}"],
        r"text: .*empty holds no text\. Allowed: a \.txt",
    ),
    "text that is no text": (
        ["compare", "--text", "{binary}", "--model", "{folder}"],
        r"binary.*UTF-8",
    ),
    "text too short": (
        ["compare", "--text", "{book}", "--model", "{folder}", "--length", "100000"],
        r"--length: 100000 came.*has \d{4} tokens.*Ask for fewer",
    ),
    "no such model": (
        ["compare", "--text", "{book}", "--model", "smollm2-135"],
        r"smollm2-135.*smollm2-135m",
    ),
    "layers that are not there": (
        ["compare", "--text", "{book}", "--model", "{folder}", "--length", "64",
         "--layers", "0,99", "--attention", "window:window=4"],
        r"99.*4",
    ),
    "layers that are no layers": (
        ["compare", "--text", "{book}", "--model", "{folder}", "--length", "64",
         "--layers", "lsat:2", "--attention", "window:window=4"],
        r"lsat",
    ),
    "out is a file": (
        ["compare", "--text", "{book}", "--model", "{folder}", "--length", "64",
         "--out", "{book}"],
        r"out: .* cannot be written.*Pass another folder",
    ),
    "stride beyond the window": (
        ["ppl", "--text", "{book}", "--model", "{folder}", "--window", "64", "--stride", "65",
         "--tokens", "200"],
        r"stride: 65 came\. Allowed: 1 \.\. window = 64",
    ),
    "too many layers": (
        ["ppl", "--text", "{book}", "--model", "{folder}", "--window", "64", "--tokens", "200",
         "--patched", "0,9"],
        r"patched: 9 came\. Allowed: 0 \.\. 4",
    ),
    "numbers that are none": (["ppl", "--patched", "0;5"], r"--patched: '0;5' came.*commas.*0,5"),
    "two questions": (["ppl", "--patched", "1", "--contexts", "5"], r"--contexts: .*one of"),
    "unknown haystack": (["passkey", "--haystack", "hay"], r"haystack: 'hay' came.*landmark"),
    "bad depth": (
        ["passkey", "--text", "{book}", "--model", "{folder}", "--lengths", "450",
         "--depths", "2"],
        r"depth: 2\.0 came\. Allowed: 0",
    ),
    "too short for a needle": (["passkey", "--lengths", "10"], r"--lengths: 10 came.*64 or more"),
    "no trials": (["passkey", "--trials", "0"], r"--trials: 0 came\. Allowed: 1 or more"),
    "bench length": (["bench", "--lengths", "0"], r"lengths: 0 came\. Allowed: 1 or more"),
    "bench heads": (["bench", "--heads", "4", "--kv-heads", "3"], r"kv_heads: 3 came.*divisor.*4"),
    "bench pass": (["bench", "--passes", "sideways"], r"passes: 'sideways' came.*backward"),
    "bench dtype": (["bench", "--dtype", "float12"], r"dtype: 'float12' came.*mean 'float\d\d"),
    "rows that are not there": (["bench", "--show", "{tmp}/no.jsonl"], r"no\.jsonl cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_message_and_exit_code(case, longspan, folder, book, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x81" * 500)
    (tmp_path / "empty").mkdir()
    places = {
        "empty": tmp_path / "empty",
        "folder": folder,
        "book": book,
        "tmp": tmp_path,
        "binary": binary,
    }
    arguments, pattern = CASES[case]
    code, out, err = longspan(*(argument.format(**places) for argument in arguments))
    message = " ".join(err.split())
    assert code == 2, (out, err)
    assert re.search(pattern, message), message
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()  # nothing is left behind by what was refused


def test_a_full_disk_is_a_message(longspan, folder, book, tmp_path, monkeypatch):
    import errno
    import os

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    code, _, err = longspan(
        "compare", "--text", book, "--model", folder, "--length", 64, "--out", tmp_path / "x",
        "--attention", "window:window=4",
    )  # fmt: skip
    assert code == 2
    assert "No space left on device" in err
    assert "free some space" in " ".join(err.split())


def test_no_space_for_the_model(longspan, book, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = longspan("compare", "--text", book, "--model", "smollm2-135m")
    message = " ".join(err.split())
    assert code == 2
    assert "smollm2-135m" in message
    assert "MB are needed" in message
    assert ", 1 free)" in message


def test_a_model_that_cannot_be_patched(longspan, book, tmp_path):
    from longspan.testing.models import save_tiny_model

    model = save_tiny_model(tmp_path / "gpt2", "gpt2")
    code, _, err = longspan(
        "compare", "--text", book, "--model", model, "--length", 64, "--out", tmp_path / "x",
        "--attention", "window:window=4", "--layers", "last:77",
    )  # fmt: skip
    assert code == 2
    assert "77" in err


def test_ctrl_c_before_anything_is_there(longspan, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("longspan.eval.compare_plan.default_attentions", interrupted)
    code, _, err = longspan("compare")
    assert code == 130
    assert "Interrupted" in err
