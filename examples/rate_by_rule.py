"""Rate a study by a fixed rule in a real browser: a rehearsal, not human preference.

    python examples/rate_by_rule.py LINK [LINK ...]

Opens each link that `diffusion-apt study serve` prints in the system's Chromium, reads the pixels
that the page shows, and answers with the page's keys. Needs `pip install playwright`. The rule, for
samples of the digits models:

0. A grainy sample, whose neighbouring pixels differ by more than 12 of 255 on average, loses every
   criterion.
1. Visual fidelity: the sharper sample wins, by the mean difference of pixels 8 apart.
2. Structural integrity: the sample whose sharpness changes less between frames wins.
3. Text alignment: the sample with more pixels of the prompt's colour wins.

Differences below the rater's tolerance count as none: 2 % for the first link, 4 % for the second,
and so on. A study that is rated this way should say so: `study make --note "..."`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

TOLERANCE = 0.02
GRAIN = 12
CRITERIA = ("fidelity", "structure", "text")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The figures that the rule needs, from several frames of a sample as the browser decoded them.
MEASURE = """async ([side, prompt]) => {
  const sample = document.querySelector(`#${side} > *`);
  const video = sample.tagName === "VIDEO";
  const [width, height] = video ? [sample.videoWidth, sample.videoHeight]
    : [sample.naturalWidth, sample.naturalHeight];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const colours = { red: [1, 0, 0], green: [0, 1, 0], blue: [0, 0, 1], yellow: [1, 1, 0],
    magenta: [1, 0, 1], cyan: [0, 1, 1], white: [1, 1, 1] };
  const colour = colours[Object.keys(colours).find((name) => prompt.includes(name))];
  const found = { grain: [], sharp: [], coloured: [] };
  for (const share of video ? [0.1, 0.3, 0.5, 0.7, 0.9] : [0]) {
    if (video) {
      await new Promise((done) => {
        sample.addEventListener("seeked", done, { once: true });
        sample.currentTime = share * sample.duration;
      });
    }
    context.drawImage(sample, 0, 0);
    const data = context.getImageData(0, 0, width, height).data;
    const at = (x, y, c) => data[4 * (y * width + x) + c];
    let [grain, sharp, coloured, count] = [0, 0, 0, 0];
    for (let y = 4; y < height; y += 8) {
      for (let x = 4; x < width - 8; x += 8) {
        count += 1;
        for (let c = 0; c < 3; c += 1) {
          grain += Math.abs(at(x, y, c) - at(x + 1, y, c)) / 3;
          sharp += Math.abs(at(x, y, c) - at(x + 8, y, c)) / 3;
        }
        if (colour?.every((on, c) => on ? at(x, y, c) > 150 : at(x, y, c) < 110)) coloured += 1;
      }
    }
    found.grain.push(grain / count);
    found.sharp.push(sharp / count);
    found.coloured.push(coloured / count);
  }
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const steps = found.sharp.slice(1).map((value, i) => Math.abs(value - found.sharp[i]));
  return { grain: mean(found.grain), fidelity: mean(found.sharp),
    structure: -mean([0, ...steps]), text: mean(found.coloured) };
}"""

READY = """() => [...document.querySelectorAll(".view > *")].filter((one) =>
  one.tagName === "VIDEO" ? one.readyState >= 2 : one.complete && one.naturalWidth
).length === 2"""


def choose(left: dict[str, float], right: dict[str, float], name: str, tolerance: float) -> str:
    """Return the key to press for a criterion: "1" is left, "2" no difference, "3" right."""
    grainy = left["grain"] > GRAIN, right["grain"] > GRAIN
    if grainy[0] != grainy[1]:
        return "3" if grainy[0] else "1"
    a, b = left[name], right[name]
    if abs(a - b) <= tolerance * max(abs(a), abs(b)):
        return "2"
    return "1" if a > b else "3"


def rate(page: Any, tolerance: float, most: int | None) -> int:
    """Rate all pairs, or at most `most`; return how many were rated."""
    rated = 0
    page.wait_for_selector("#intro:not([hidden]), #rating:not([hidden]), #done:not([hidden])")
    if page.is_visible("#start"):
        page.click("#start")
    while most is None or rated < most:
        page.wait_for_selector("#rating:not([hidden]), #done:not([hidden])")
        if page.is_visible("#done"):
            break
        page.wait_for_function(READY)
        if page.text_content("#play") == "Pause":
            page.keyboard.press("Space")  # frames are read one by one
        prompt = page.text_content("#prompt") or ""
        left, right = (page.evaluate(MEASURE, [side, prompt]) for side in ("left", "right"))
        title = page.text_content("#pair-title")
        for name in CRITERIA:
            page.keyboard.press(choose(left, right, name, tolerance))
        page.keyboard.press("Enter")
        page.wait_for_function(
            "(title) => document.querySelector('#pair-title').textContent !== title "
            "|| !document.querySelector('#done').hidden",
            arg=title,
        )
        rated += 1
    return rated


def main() -> int:
    """Rate with every link; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("links", nargs="+", metavar="LINK", help="one for each rater")
    parser.add_argument("--most", type=int, help="stop after this many pairs per rater")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print("error: there is no Chromium or Chrome on this machine", file=sys.stderr)
        return 2

    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Only the given links are opened, and Chromium's sandbox does not work as root.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for number, link in enumerate(args.links, 1):
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.goto(link)
            print(f"rater {number}: {rate(page, number * TOLERANCE, args.most)} rated", flush=True)
            page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
