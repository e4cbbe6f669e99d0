"""A person's path through the page of `prune demo`, in headless Chromium: python demo_browser.py [SHOTS].

Starts the command as a user would, with a hook that notes every address it connects to, clicks through the page, and
fails at the first thing that is not as it should be. Screenshots go to the folder SHOTS. Needs gradio, playwright and
a Chromium (`CHROMIUM`, default: the first on the path).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

# notes on stderr what the server asks of any machine but this one
SERVE = """
import sys
LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)
def note(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments
    else:
        return
    if isinstance(address, tuple) and address[0] not in LOCAL:
        print("NETWORK", event, address, file=sys.stderr, flush=True)
sys.addaudithook(note)
from prune.cli import main
main()
"""
WAIT = 120_000  # ms, for what takes longest: three answers of the largest model on a busy machine


class Server:
    """`prune demo` in a process of its own."""

    def __init__(self, *arguments: str):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.files = tempfile.TemporaryDirectory()
        # what it would ask of the hub must show
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "GRADIO_TEMP_DIR": self.files.name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            self.process.wait(10)
            raise SystemExit(f"prune demo did not start:\n{self.said()}")

    def said(self) -> str:
        return Path(self.log.name).read_text()

    def stop(self) -> list[str]:
        """Ctrl-C; the uploads and drawings that are left on the disk."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(WAIT / 1000)
        return [file.name for file in Path(self.files.name).rglob("*") if file.is_file()]


def bad_files(folder: Path) -> list[tuple[Path, str]]:
    """Files that are no usable picture, and what the page says of each."""

    def write(name: str, data: bytes, says: str) -> tuple[Path, str]:
        (folder / name).write_bytes(data)
        return folder / name, says

    Image.effect_noise((300, 200), 90).save(folder / "whole.png")
    Image.effect_noise((300, 200), 90).convert("RGB").save(folder / "whole.jpg")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    Image.new("L", (3000, 2), 9).save(folder / "line.png")
    whole = (folder / "whole.png").read_bytes()
    return [
        write("notes.txt", b"this is a text\n", "not a picture in a known format"),
        write("text.png", b"this is a text too\n", "not a picture in a known format"),
        write("empty.png", b"", "is empty"),
        write("truncated.png", whole[: len(whole) // 2], "is broken"),
        write("truncated.jpg", (folder / "whole.jpg").read_bytes()[:2000], "is broken"),
        (folder / "huge.png", "100 megapixels"),
        (folder / "line.png", "at most 20 : 1"),
        write("heavy.bmp", b"BM" + bytes(65 * 2**20), "maximum allowed size"),  # gradio's own words
        write("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture in a known format"),
        write("print.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
    ]


def good_files(folder: Path) -> list[tuple[Path, str]]:
    """Odd files that are pictures all the same, and what the page says of each, if anything."""
    frames = [Image.new("RGB", (120, 90), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[2].convert("CMYK").save(folder / "print.jpg")
    Image.new("I;16", (90, 60), 40_000).save(folder / "sixteen.png")
    Image.new("RGBA", (90, 60), (255, 0, 0, 90)).save(folder / "alpha.png")
    Image.new("P", (90, 60)).save(folder / "palette.png")
    return [
        (folder / "animated.gif", "the first one is used"),
        *((folder / name, "") for name in ("print.jpg", "sixteen.png", "alpha.png", "palette.png")),
    ]


class Visitor:
    """A person at the page."""

    def __init__(self, page: Page, shots: Path):
        self.page, self.shots = page, shots
        self.answers = page.locator("#answers")

    def shot(self, name: str) -> None:
        self.page.wait_for_timeout(600)  # fades and pictures on their way
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def source(self, where: str) -> str:
        """The address of the picture shown in a component, "" if there is none."""
        found = self.page.locator(f"#{where} img")
        return found.first.get_attribute("src") if found.count() else ""

    def picture_changes(self, where: str, before: str) -> None:
        deadline = time.monotonic() + WAIT / 1000
        while self.source(where) in ("", None, before):
            assert time.monotonic() < deadline, f"the picture in #{where} did not change"
            self.page.wait_for_timeout(50)

    def pick(self, number: int) -> None:
        before = self.source("picture")
        self.page.locator("#examples button.thumbnail-item").nth(number).click()
        self.picture_changes("picture", before)

    def choose(self, which: str, method: str) -> None:
        box = self.page.locator(f"#{which} input")
        box.click()
        self.page.locator(f"#{which}").get_by_role("option", name=method, exact=True).click()
        expect(box).to_have_value(method)

    def budget(self, percent: int) -> None:
        box = self.page.locator("#budget input[type=number]")
        box.fill(str(percent))
        box.press("Tab")

    def ask(self) -> list[str]:
        """The row of answers, once all three are there."""
        self.page.locator("#answers").evaluate("one => one.querySelector('.prune-table')?.remove()")
        self.page.locator("#ask").click()
        expect(self.answers.locator("thead th")).to_have_count(4, timeout=WAIT)
        return self.row("Answer")

    def row(self, heading: str) -> list[str]:
        found = self.answers.locator("tbody tr", has=self.page.get_by_role("rowheader", name=heading, exact=True))
        return [text.strip() for text in found.locator("td").all_inner_texts()]

    def warned(self, text: str) -> None:
        """A message with this text appears; it is then closed."""
        toast = self.page.locator(".toast-body", has_text=text)
        expect(toast.first).to_be_visible(timeout=WAIT)
        for button in self.page.locator(".toast-close").all():
            button.click()
        expect(self.page.locator(".toast-body")).to_have_count(0)

    def upload(self, file: Path) -> None:
        self.page.locator("#upload input[type=file]").set_input_files(file)


def visit(visitor: Visitor, folder: Path) -> None:
    """The path. Numbers are those of the built-in model."""
    page = visitor.page
    expect(page.locator("#examples button.thumbnail-item")).to_have_count(12)
    visitor.shot("1-start")

    step("pick an example and ask")
    visitor.pick(3)
    expect(page.locator("#question textarea")).to_have_value("Which digit is leftmost?")
    visitor.choose("method-a", "visionzip")
    visitor.choose("method-b", "random")
    visitor.budget(25)
    answers = visitor.ask()
    assert answers[0] == "0", answers
    expect(visitor.answers.locator("p")).to_have_text("Right answer: 0")
    assert [text.split()[0] for text in visitor.row("Tokens after the last cut")] == ["144", "36", "36"]
    for heading, unit in (
        ("FLOPs of prefill", "FLOPs"),
        ("KV cache", "iB"),
        ("First token", "ms"),
        ("Whole answer", "ms"),
    ):
        texts = visitor.row(heading)
        assert len(texts) == 3 and all(unit in text and float(text.split()[0]) > 0 for text in texts), texts
    visitor.picture_changes("kept-a", "")
    visitor.picture_changes("kept-b", "")
    assert visitor.source("kept-a") != visitor.source("kept-b")
    visitor.shot("2-answers")

    step("change methods and budget: answers and drawings change")
    before = visitor.source("kept-a"), visitor.source("kept-b")
    visitor.choose("method-a", "norm_diversity")
    visitor.choose("method-b", "uniform")
    visitor.budget(11)
    visitor.ask()
    assert [text.split()[0] for text in visitor.row("Tokens after the last cut")] == ["144", "16", "16"]
    visitor.picture_changes("kept-a", before[0])
    visitor.picture_changes("kept-b", before[1])
    expect(visitor.answers.locator("thead")).to_contain_text("norm_diversity")
    visitor.shot("3-smaller-budget")

    step("a budget that one method cannot reach: it says why, the other answers")
    visitor.choose("method-b", "fastv")
    assert "out of reach" in visitor.ask()[2]
    assert visitor.row("KV cache")[1].endswith("%") and len(visitor.row("KV cache")) == 2
    visitor.shot("4-out-of-reach")
    page.get_by_label("visual tokens after the last cut").check()
    assert "out of reach" not in visitor.ask()[2]

    step("questions that cannot be asked")
    for question, says in (
        ("   ", "ask something"),
        ("What <image> is this?", "means something to the model"),
        ("long " * 201, "at most 1000"),
    ):
        page.locator("#question textarea").fill(question)
        page.locator("#ask").click()
        visitor.warned(says)
    page.locator("#question textarea").fill("Is there <b>a</b> zebra?")
    page.locator("#question textarea").press("Enter")
    visitor.warned("does not know: b, zebra")

    files = bad_files(folder)
    for file, says in files:
        step(f"bad upload: {file.name}")
        before = visitor.source("picture")
        visitor.upload(file)
        if file.name == "truncated.png":
            expect(page.locator(".toast-body")).to_be_visible(timeout=WAIT)
            visitor.shot("5-bad-upload")
        visitor.warned(says)
        assert visitor.source("picture") == before

    for file, says in good_files(folder):
        step(f"odd upload: {file.name}")
        before = visitor.source("picture")
        visitor.upload(file)
        visitor.picture_changes("picture", before)
        if says:
            visitor.warned(says)
        page.locator("#question textarea").fill("What colour is the digit?")
        assert len(visitor.ask()) == 3

    step("a photograph")
    from sklearn.datasets import load_sample_image

    Image.fromarray(load_sample_image("china.jpg")).save(folder / "china.jpg")
    before = visitor.source("picture")
    visitor.upload(folder / "china.jpg")
    visitor.picture_changes("picture", before)
    expect(visitor.answers).to_have_text("Press Ask.")  # the last picture's answers are gone
    assert visitor.source("kept-a") == ""
    page.locator("#question textarea").fill("What is shown in this picture?")
    visitor.ask()
    visitor.picture_changes("kept-b", "")
    visitor.warned("does not know: shown, in, this, picture")
    visitor.shot("6-own-picture")

    step("many questions")
    visitor.choose("method-b", "random")
    page.get_by_role("tab", name="Many questions").click()
    page.locator("#ask-all").click()
    sums = page.locator("#many tr.sum td")
    expect(sums).to_have_count(3, timeout=WAIT)
    texts = sums.all_inner_texts()
    assert texts[0] == "12 of 12" and all(re.fullmatch(r"\d+ of 12", text) for text in texts), texts
    expect(page.locator("#many tbody tr")).to_have_count(13)
    visitor.shot("7-many")
    print(f"    right: {', '.join(texts)}")

    step("another visitor, a narrow window, dark")
    other = page.context.browser.new_context(viewport={"width": 420, "height": 900}, color_scheme="dark").new_page()
    other.goto(page.url)
    narrow = Visitor(other, visitor.shots)
    narrow.pick(1)
    narrow.ask()
    narrow.shot("8-narrow-dark")
    assert other.evaluate("document.documentElement.scrollWidth") <= 420
    other.close()


def visit_other(visitor: Visitor) -> None:
    """The page of a model that refuses some methods, and has photographs for examples."""
    page = visitor.page
    expect(page.locator("#examples button.thumbnail-item")).to_have_count(14)
    why = page.get_by_role("button", name="methods are not offered")
    why.click()
    expect(page.locator("li", has_text="fastervlm").first).to_contain_text("CLS")
    visitor.choose("method-a", "divprune")
    visitor.choose("method-b", "dart")
    page.locator("#method-b input").click()
    offered = page.locator("#method-b").get_by_role("option").all_inner_texts()
    assert any("dart" in name for name in offered) and not any("fastervlm" in name for name in offered), offered
    page.locator("#method-b input").press("Escape")
    visitor.ask()
    visitor.picture_changes("kept-b", "")
    visitor.shot("9-another-model")


def step(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shots", nargs="?", type=Path, default=Path("demo-shots"))
    shots = parser.parse_args().shots
    shots.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise SystemExit("no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path, arguments in (
            (lambda visitor: visit(visitor, Path(folder)), []),
            (visit_other, ["--model", "demo:qwen2.5-vl", "--max-new-tokens", "8"]),
        ):
            step(f"prune demo {' '.join(arguments)}")
            serve_and_visit(browser, path, arguments, shots)
        browser.close()
    print("passed")


def serve_and_visit(browser: Browser, path, arguments: list[str], shots: Path) -> None:
    server = Server(*arguments)
    try:
        step(f"it is at {server.url}")
        assert server.url.startswith("http://127.0.0.1:"), server.url
        page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        try:
            path(Visitor(page, shots))
        except BaseException:
            page.screenshot(path=shots / "failed.png", full_page=True)
            raise
        foreign = {url for url in requests if not url.startswith((server.url, "data:", "blob:"))}
        assert not foreign, f"the page asked for {foreign}"
        assert not errors, f"scripts of the page failed: {errors}"
        page.context.close()
    finally:
        left = server.stop()
        said = server.said()
        print(f"    the server said: {said[-3000:] or 'nothing'}")
    assert "Traceback" not in said and "NETWORK" not in said
    assert not left, f"files are left: {left}"
    step(f"{len(requests)} requests, all to this machine")


STARTED = time.monotonic()

if __name__ == "__main__":
    main()
