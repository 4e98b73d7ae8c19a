"""The page of `inspect report` in a real browser, by clicking and typing."""

import re
from pathlib import Path

import pytest
from PIL import Image

from secondcast.inspection.report.page import render, render_run
from secondcast.inspection.report.run import run_data
from tests.inspection.report.report_data import (
    FIRST,
    HOSTILE,
    ROWS,
    STEPS,
    STRIPS,
    frame_colour,
    hostile_data,
    report_data,
    student,
    trajectories,
    webp,
)
from tests.inspection.report.test_run_report import make_run

# A browser takes seconds to start.
pytestmark = pytest.mark.slow

pytest_plugins = ("tests.inspection.report.browser",)

ROOT = Path(__file__).resolve().parents[3]
CONTRASTS = (Path(__file__).parent / "contrasts.js").read_text()
# By way of a second canvas: the page's own is not made for being read.
PIXEL = """canvas => {
    const copy = new OffscreenCanvas(1, 1).getContext("2d");
    copy.drawImage(canvas, -3, -3);
    return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


@pytest.fixture(scope="module")
def html():
    return render(report_data())


def numbers(page):
    return [int(text) for text in page.locator("#scroller tr[data-row] td:first-child").all_inner_texts()]


def test_search_keeps_what_has_all_words_and_the_source_filter_its_source(visit, html):
    page = visit(html)
    page.fill("#query", "GREEN tri")
    assert page.inner_text("#count") == "2 of 30 trajectories"
    assert numbers(page) == [FIRST + 11, FIRST + 26]
    page.fill("#query", "")
    page.select_option("#source", "sign")
    # Row 3 has both sources, as every odd row has this one.
    assert (
        numbers(page)[:3] == [FIRST + 1, FIRST + 3, FIRST + 5] and page.inner_text("#count") == "15 of 30 trajectories"
    )
    page.fill("#query", "no such words")
    assert numbers(page) == [] and page.inner_text("#count") == "0 of 30 trajectories"
    page.fill("#query", "0000000000000000000000000000000b")
    assert numbers(page) == [FIRST + 11]


def test_columns_sort_both_ways_with_missing_values_last(visit, html):
    page = visit(html)
    values = trajectories()["velocity_rms"]
    read = [row for row in range(ROWS) if row != 4]
    velocity = page.locator("th[data-column=velocity_rms]")
    velocity.locator("button").click()
    assert velocity.get_attribute("aria-sort") == "ascending"
    assert page.locator("th[aria-sort]").count() == 1
    assert numbers(page)[:5] == [FIRST + row for row in sorted(read, key=lambda row: values[row])][:5]
    velocity.locator("button").press("Enter")
    assert velocity.get_attribute("aria-sort") == "descending"
    assert numbers(page)[:5] == [FIRST + row for row in sorted(read, key=lambda row: -values[row])][:5]
    page.locator("#scroller").evaluate("node => node.scrollTo(0, 1e6)")
    page.wait_for_selector(f"#scroller tr[data-row]:nth-last-child(2) >> text={FIRST + 4}")
    # Of errors the largest come first; the worst step is another order than the mean.
    page.click("th[data-column='worst run'] button")
    assert numbers(page)[:4] == [FIRST + row for row in (2, 11, 7, 25)]
    page.click("th[data-column='mean run'] button")
    assert numbers(page)[:4] == [FIRST + row for row in (11, 2, 7, 25)]


def test_a_press_on_a_row_is_a_click_also_while_the_table_scrolls(visit, html):
    page = visit(html)
    box = page.locator("#row-5").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.locator("#scroller").evaluate(
        "node => new Promise((d) => { node.scrollTop += 9; requestAnimationFrame(() => requestAnimationFrame(d)); })"
    )
    page.mouse.up()
    page.wait_for_selector(f"#detail-title:has-text('Trajectory {FIRST + 5}')")
    assert page.get_attribute("#row-5", "aria-selected") == "true"
    assert page.get_attribute("#row-5", "aria-rowindex") == "7"


def shown(page, row, place, *, label="latent"):
    canvas = page.locator(f"#viewer canvas[aria-label^='{label}'][data-shown='{row}/{place}']")
    canvas.wait_for()
    return tuple(canvas.evaluate(PIXEL))


def test_a_chosen_row_shows_the_frames_of_the_step_on_the_slider(visit, html):
    page = visit(html)
    page.click(f"#row-{12 - FIRST + 10}")
    page.wait_for_selector("#viewer >> text=no film strip in this report")
    page.click("#row-7")
    page.wait_for_selector("#detail-title:has-text('Trajectory 12')")
    assert page.inner_text("#detail-title") == "Trajectory 12"
    assert shown(page, 7, STEPS) == frame_colour(7, STEPS, 0)
    page.locator("#step").fill("5")
    assert shown(page, 7, 5) == frame_colour(7, 5, 0)
    assert shown(page, 7, 5, label="predicted clean") == frame_colour(7, 5, 1)
    assert page.inner_text("#step-text") == "step 5 of 8, σ 0.375, timestep 0.375"
    page.press("#step", "ArrowLeft")
    assert shown(page, 7, 4) == frame_colour(7, 4, 0) and page.url.endswith("#row=12&step=4")
    page.click("#viewer .marks button >> nth=2")
    assert shown(page, 7, 2) == frame_colour(7, 2, 0)
    assert page.locator("#viewer .marks .present").get_attribute("aria-label").startswith("step 2 of 8")
    page.click("#viewer .slider button")
    assert shown(page, 7, STEPS) == frame_colour(7, STEPS, 0) and page.url.endswith("#row=12")
    assert "latent error 25 %, PSNR 21.5 dB, SSIM 0.75" in page.inner_text("#closed")


def test_a_damaged_trajectory_says_that_it_is(visit, html):
    page = visit(html, f"#row={FIRST + 6}")
    assert "its shard is damaged" in page.inner_text("#viewer") and "inspect images" not in page.inner_text("#viewer")


def test_strips_follow_each_other_and_a_number_typed_is_gone_to(visit, html):
    page = visit(html)
    assert page.inner_text("#strip-place") == "film strip 1 of 3: random"
    page.click("text=Next strip")
    assert page.inner_text("#detail-title") == f"Trajectory {FIRST + STRIPS[1]}"
    page.click("text=Previous strip")
    page.click("text=Previous strip")
    assert page.inner_text("#detail-title") == f"Trajectory {FIRST + STRIPS[2]}"
    page.fill("#number", "prompt 12")
    page.press("#number", "Enter")
    assert page.inner_text("#detail-title") == "Trajectory 12"
    page.fill("#number", "step 5 of prompt 25")
    page.press("#number", "Enter")
    assert page.inner_text("#detail-title") == "Trajectory 25" and page.url.endswith("#row=25&step=5")
    page.fill("#number", "99")
    page.press("#number", "Enter")
    assert page.inner_text("#jump-error") == "No trajectory 99 here: 5 to 34"
    page.click("#gallery button >> nth=1")
    assert shown(page, STRIPS[1], 5) == frame_colour(STRIPS[1], 5, 0)


def test_a_row_without_a_strip_says_which_command_shows_it(visit):
    page = visit(render(report_data(cache="/data/my cache")), "#row=9")
    assert page.inner_text("#viewer code") == "secondcast inspect images '/data/my cache' 9"
    assert page.locator("#detail-errors").is_hidden()
    facts = page.inner_text("#detail-facts")
    assert "not read for this report" in facts and f"{4:032x}-0000" in facts


def test_the_heat_map_has_the_hardest_prompt_first_and_opens_it(visit, html):
    page = visit(html)
    readout = page.locator("#heat-readout")
    page.focus("canvas.heat")
    order = []
    for _ in range(5):
        order.append(int(re.match(r"prompt (\d+), step 0", readout.inner_text())[1]) - FIRST)
        page.keyboard.press("ArrowDown")
    assert order == [11, 2, 7, 25, 25]
    for key in ("PageUp", "ArrowDown", "End", "ArrowLeft"):
        page.keyboard.press(key)
    assert readout.inner_text() == f"prompt {FIRST + 2}, step 6: 5 % (replay error 1 %). a blue triangle of 2"
    page.keyboard.press("Enter")
    assert page.inner_text("#detail-title") == f"Trajectory {FIRST + 2}" and shown(page, 2, 6) == frame_colour(2, 6, 0)
    # The last cell of all, by mouse.
    box = page.locator("canvas.heat").bounding_box()
    page.locator("canvas.heat").click(position={"x": box["width"] - 4, "y": box["height"] - 4})
    assert page.inner_text("#detail-title") == f"Trajectory {FIRST + 25}"


def test_students_are_chosen_and_their_means_compared_with_the_replay_error(visit):
    page = visit(render(report_data(students=[student(), student("other", 0.5)])))
    page.select_option("#student", label="other")
    page.focus("canvas.heat")
    assert "step 0: 20 % (replay error 1 %)" in page.inner_text("#heat-readout") and page.url.endswith("student=other")
    page.focus("#errors svg[role=img][tabindex]")
    page.keyboard.press("ArrowRight")
    assert "step 0: run 35 %, replay error of run 1 %, other 17.5 %, replay error of other 1 %" in page.inner_text(
        "#errors"
    )
    assert page.locator("#errors polyline.dashed").count() == 2


def test_the_curves_of_the_run_have_axes_and_a_cursor(visit, html):
    page = visit(html)
    loss = page.locator("#curves svg[aria-label^='loss by optimizer step, logarithmic: loss ends at 0.1']")
    assert {"0.1", "0.2", "0.5", "1", "2"} <= set(loss.locator("text").all_text_contents())
    loss.focus()
    page.keyboard.press("End")
    assert "step 100: loss 0.1, validation loss 0.2" in page.inner_text("#curves")
    assert page.locator("#curves svg[aria-label^='learning rate by optimizer step: ']").count() == 1


def test_histograms_count_all_rows_or_those_that_match(visit, html):
    page = visit(html)
    guidance = page.locator("#histograms figure").nth(0)
    assert "30 values, 2 to 5" in guidance.locator("svg").get_attribute("aria-label")
    assert "29 of 30 trajectories" in page.locator("#histograms figure").nth(2).inner_text()
    page.check("#only-matches")
    page.fill("#query", "triangle")
    assert "10 of 10 trajectories" in guidance.inner_text()
    guidance.locator("summary").click()
    counts = guidance.locator("tbody td:last-child").all_inner_texts()
    assert len(counts) == 7 and sum(map(int, counts)) == 10


def test_a_hash_restores_the_view_and_a_changed_one_changes_it(visit, html):
    page = visit(html, "#row=12&step=5&q=triangle&sort=-tokens")
    assert page.input_value("#query") == "triangle" and page.inner_text("#detail-title") == "Trajectory 12"
    assert page.locator("th[data-column=tokens]").get_attribute("aria-sort") == "descending"
    assert shown(page, 7, 5) == frame_colour(7, 5, 0) and page.input_value("#step") == "5"
    page.evaluate("location.hash = '#row=25&step=999'")
    page.wait_for_selector("#detail-title:text-is('Trajectory 25')")
    assert shown(page, 20, STEPS) == frame_colour(20, STEPS, 0) and page.input_value("#query") == ""
    page.evaluate("location.hash = '#row=<b>&step=x&sort=nothing&student=%FF&show=what'")
    page.wait_for_selector("#detail-title:text-is('Trajectory 12')")


def test_damage_is_named_with_the_command_that_repairs_it(visit, html):
    problem = {"path": "a/<b>.tar", "problem": "is missing", "repair": "secondcast repair 'my cache' --from COPY"}
    integrity = {"state": "damaged", "text": "1 of 9 files", "problems": [problem]}
    page = visit(render(report_data(integrity=integrity)))
    assert page.inner_text("#badge") == "✕ damaged"
    assert page.inner_text("#problems p") == "a/<b>.tar is missing"
    page.click("#problems button")
    assert page.evaluate("navigator.clipboard.readText()") == problem["repair"]
    assert visit(html).inner_text("#badge") == "✓ intact"
    unread = {"state": "not checked", "text": "--no-verify-checksums", "problems": []}
    assert visit(render(report_data(integrity=unread))).inner_text("#badge") == "? not checked"


def test_a_hostile_prompt_is_text(visit):
    page = visit(render(hostile_data()), f"#row={FIRST}")
    assert page.locator("#detail-prompt").evaluate("node => node.textContent") == HOSTILE
    assert page.inner_text("h1") == "<b>mine</b>" and page.locator("img[src=x], b").count() == 0


def test_notes_stand_beside_what_they_speak_of(visit, html):
    page = visit(html)
    places = {"distributions": "norms of 29", "strips": "film strips of 3", "students": "4 held-out", "summary": "so"}
    for place, text in places.items():
        assert page.inner_text(f"[data-notes={place}]").startswith(text)


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.getAttribute('role') || 'other'")


def test_everything_on_the_way_to_a_frame_is_reached_by_keyboard(visit, html):
    page = visit(html)
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert focused(page) == "trajectories"
    page.keyboard.press("Tab")
    page.keyboard.type("triangle")
    for expected in ("source", "show", "grid"):
        page.keyboard.press("Tab")
        assert focused(page) == expected
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert focused(page) == "step" and page.inner_text("#detail-title") == f"Trajectory {FIRST + 2}"
    page.keyboard.press("Home")
    assert shown(page, 2, 0) == frame_colour(2, 0, 0)
    page.keyboard.press("Escape")
    assert focused(page) == "grid"
    page.keyboard.press("End")
    active = page.get_attribute("#scroller table", "aria-activedescendant")
    assert page.locator(f"#{active}[aria-selected=true]").inner_text().split()[0] == str(FIRST + 29)


def test_the_gallery_is_one_stop_of_tab_and_arrow_keys_go_through_it(visit, html):
    page = visit(html, "#row=12")
    stops = page.locator("#gallery button[tabindex='0']")
    numbers = page.locator("#gallery .number").all_inner_texts()
    assert stops.count() == 1 and stops.get_attribute("aria-current") == "true" and len(numbers) > 2
    stops.focus()
    last = len(numbers) - 1
    # All of them lie in one row.
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowDown", last), ("ArrowUp", 0), ("End", last)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.querySelector('.number').innerText") == numbers[place]
        assert stops.count() == 1
    # What a browser does with these keys, such as going back, stays its own.
    page.keyboard.press("Control+Home")
    assert page.evaluate("document.activeElement.querySelector('.number').innerText") == numbers[last]
    page.keyboard.press("Enter")
    number = int("".join(filter(str.isdigit, numbers[-1].split()[0])))
    page.wait_for_selector(f"#detail-title:has-text('Trajectory {number}')")


def test_text_and_lines_stand_out_in_light_and_dark(visit):
    problem = {"path": "a", "problem": "is missing", "repair": "secondcast repair"}
    integrity = {"state": "damaged", "text": "so", "problems": [problem]}
    many = [student(f"run {number}") for number in range(6)]
    page = visit(render(report_data(integrity=integrity, students=many)))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for badge in ("damaged", "intact", "unchecked"):
            page.evaluate("name => { document.querySelector('#badge').className = `badge ${name}`; }", badge)
            found = page.evaluate(CONTRASTS)
            assert len(found) > 100 and [weak for weak in found if weak["ratio"] < weak["needed"]] == []
            assert (found[0]["background"] < 0.2) == (scheme == "dark")


def test_a_narrow_page_does_not_scroll_sideways_and_goes_to_the_detail_and_back(visit, html):
    page = visit(html, width=390)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#row-1")
    assert 0 <= page.locator("#detail").bounding_box()["y"] < 100
    page.click("#detail .back")
    assert 0 <= page.locator("#trajectories").bounding_box()["y"] < 100
    assert visit(html).locator("#detail .back").is_hidden()


def test_the_first_column_stays_in_sight_when_the_table_scrolls_sideways(visit, html):
    page = visit(html, width=390)
    cells = page.locator("#scroller th:first-child, #row-1 td:first-child")
    before = [cell.bounding_box()["x"] for cell in cells.all()]
    page.locator("#scroller").evaluate("node => node.scrollTo(150, 0)")
    assert page.locator("#row-1 td:nth-child(2)").bounding_box()["x"] < 0
    assert [cell.bounding_box()["x"] for cell in cells.all()] == before


def test_teacher_students_and_untrained_student_are_side_by_side_at_the_top(visit):
    earlier = student("earlier")
    earlier["closed"]["final"] = []
    page = visit(render(report_data(students=[student(), earlier])))
    cards = page.locator("#pictures li")
    assert cards.count() == 2 and page.locator("main section:visible").first.get_attribute("id") == "pictures"
    # An earlier evaluation has no images to show.
    assert cards.nth(1).locator("figcaption").all_inner_texts() == ["teacher", "student", "untrained"]
    alternatives = cards.nth(1).locator("img").evaluate_all("all => all.map((one) => one.alt)")
    assert alternatives == [f"{name}: a red circle of 25" for name in ("teacher", "student", "untrained")]
    sources = cards.nth(0).locator("img").evaluate_all("all => all.map((one) => one.src)")
    assert sources == [webp(Image.new("RGB", (12, 12), colour)) for colour in ((4, 5, 6), (1, 2, 3), (7, 8, 9))]
    cards.nth(1).locator("button").click()
    assert page.inner_text("#detail-title") == f"Trajectory {FIRST + 25}"


def test_without_pictures_there_is_no_section_for_them(visit):
    page = visit(render(report_data(pictures={"rows": [], "teacher": [], "untrained": []})))
    assert page.locator("#pictures").is_hidden() and page.locator("#to-pictures").is_hidden()


def test_a_closed_loop_without_psnr_shows_what_was_measured(visit):
    one = student()
    one["closed"] |= {"psnr_db": [], "ssim": []}
    page = visit(render(report_data(students=[one])), "#row=12")
    text = page.inner_text("#closed")
    assert "latent error 25 %" in text and "PSNR" not in text and "identical" not in text


def test_a_filter_that_nothing_matches_is_cleared_by_a_button(visit, html):
    page = visit(html)
    page.select_option("#source", "sign")
    page.fill("#query", "no such words")
    assert page.inner_text("#scroller .none p") == "No trajectory matches."
    page.click("#scroller .none button")
    assert page.inner_text("#count") == "30 trajectories" and page.locator("#scroller .none").is_hidden()
    assert page.input_value("#query") == "" and page.input_value("#source") == "" and focused(page) == "query"


def test_a_bar_of_a_histogram_filters_the_table_by_its_range(visit, html):
    page = visit(html)
    velocity = page.locator("#histograms figure").nth(2)
    bars = velocity.locator("[role=button]")
    values = trajectories()["velocity_rms"]
    read = [value for value in values if value is not None]
    width = (max(read) - min(read)) / 24
    expected = [FIRST + row for row, value in enumerate(values) if value is not None and value < min(read) + width]
    assert bars.count() == 24 and 0 < len(expected) < 10
    # By its foot: the bar is low, and what can be clicked is as tall as the plot.
    bars.first.click()
    assert numbers(page) == expected and page.inner_text("#count") == f"{len(expected)} of 30 trajectories"
    assert bars.first.get_attribute("aria-pressed") == "true" and "bin=velocity_rms.0" in page.url
    assert page.inner_text("#bin").startswith("Velocity, root mean square: 1 to ")
    assert numbers(visit(html, "#bin=velocity_rms.0")) == expected
    page.click("#bin")
    assert page.inner_text("#count") == "30 trajectories" and page.locator("#bin").is_hidden()
    for wrong in ("velocity_rms.24", "velocity_rms.x", "nothing.0", "velocity_rms"):
        assert visit(html, f"#bin={wrong}").inner_text("#count") == "30 trajectories"


def test_bars_of_a_histogram_are_one_stop_of_tab_and_filter_by_keyboard(visit, html):
    page = visit(html)
    guidance = page.locator("#histograms figure").first
    stops = guidance.locator("[role=button][tabindex='0']")
    page.check("#only-matches")
    page.keyboard.press("Tab")
    assert stops.count() == 1 and stops.evaluate("node => node === document.activeElement")
    for key in ("Home", "ArrowLeft", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    # The bars are drawn again, for the matches: the one that was pressed keeps the focus.
    assert page.inner_text("#count") == "5 of 30 trajectories" and stops.get_attribute("aria-pressed") == "true"
    assert stops.get_attribute("aria-label") == "2.5: 5" and stops.evaluate("node => node === document.activeElement")
    assert "The table shows 2.5: go to the table" in guidance.inner_text()
    page.keyboard.press("Space")
    assert page.inner_text("#count") == "30 trajectories" and stops.get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(visit, html, tmp_path, width, scheme):
    axe = ROOT / ".ci/javascript/node_modules/axe-core/axe.min.js"
    if not axe.is_file():
        pytest.skip("axe-core is not here: `make check-javascript` installs it")
    run = render_run(run_data(make_run(tmp_path / "run", sheets=2)))
    for name, content in (("report", html), ("run", run)):
        page = visit(content, width=width, scheme=scheme)
        page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")["violations"]
        assert [(name, one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def test_a_column_without_any_value_is_left_out(visit):
    table = trajectories() | {name: [None] * ROWS for name in ("guidance", "velocity_rms", "final_rms", "non_finite")}
    page = visit(render(report_data(trajectories=table)))
    assert page.locator("#scroller th").evaluate_all("cells => cells.map((cell) => cell.dataset.column)") == [
        "number", "prompt", "mean run", "worst run", "source", "tokens",
    ]  # fmt: skip
    assert page.locator("#histograms h3").all_inner_texts() == ["Tokens of the prompt"]


def test_a_student_that_was_not_evaluated_has_no_heat_map_and_its_curves(visit):
    idle = student("idle") | {
        "rows": [],
        "steps": [],
        "errors": [],
        "replay_error": None,
        "closed": None,
        "parameters": None,
    }
    page = visit(render(report_data(students=[idle, student()])))
    assert page.inner_text("#errors h3 >> nth=0") == "idle" and page.locator("canvas.heat").is_hidden()
    assert page.inner_text("#errors p >> nth=0") == "Not evaluated in this report."
    assert "Training of idle" in page.inner_text("#curves")
    page.select_option("#student", label="run")
    assert page.locator("canvas.heat").is_visible()


def test_a_note_stands_beside_what_it_speaks_of(visit):
    page = visit(render(report_data(notes=["no closed loop: it needs the VAE", "no film strips: no student needs it"])))
    assert page.inner_text("[data-notes=students]") == "no closed loop: it needs the VAE"
    assert page.inner_text("[data-notes=strips]") == "no film strips: no student needs it"


def test_a_report_of_an_empty_cache_says_so(visit):
    strips = {"frame_px": 12, "steps": [], "rows": []}
    page = visit(render(report_data(trajectories=trajectories(0), strips=strips, students=[], notes=[])))
    assert page.inner_text("#detail-title") == "No trajectories" and page.inner_text("#count") == "0 trajectories"
    assert "No student in this report." in page.inner_text("#errors")
    assert "No film strips in this report." in page.inner_text("#gallery")


def test_of_a_hundred_thousand_rows_only_those_in_sight_are_in_the_document(visit):
    page = visit(render(report_data(trajectories=trajectories(100_000))))
    assert page.locator("#scroller tr[data-row]").count() < 60
    page.fill("#query", "red 99,99")
    assert page.inner_text("#count") == "2 of 100,000 trajectories"
    assert numbers(page) == [FIRST + 99_990, FIRST + 99_995]
    page.fill("#query", "")
    page.focus("#scroller table")
    page.keyboard.press("End")
    page.wait_for_selector("#row-99999[aria-selected=true]")
    assert page.locator("#scroller tr[data-row]").count() < 60
