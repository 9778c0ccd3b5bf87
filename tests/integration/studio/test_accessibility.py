"""Accessibility of all tabs: axe-core, the keyboard, narrow windows."""

from __future__ import annotations

import pytest

axe_module = pytest.importorskip("axe_playwright_python.sync_playwright")

TABS = ("Train", "Generate", "Library")
OF_GRADIO: dict[str, str] = {}
"""Rules that Gradio's own components break, with the reason why they cannot be mended here."""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", TABS)
def test_axe_finds_nothing_serious(studio, open_page, name, theme, shots):
    page = open_page(f"{studio.url}?__theme={theme}").page
    page.get_by_role("tab", name=name).click()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(700)
    if shots is not None:
        page.screenshot(path=shots / f"{name.lower()}-{theme}.png", full_page=True)
    violations = axe_module.Axe().run(page).response["violations"]
    serious = {
        f"{each['id']}: {[node['html'][:200] for node in each['nodes'][:4]]}"
        for each in violations
        if each["impact"] in ("serious", "critical") and each["id"] not in OF_GRADIO
    }
    assert not serious


@pytest.mark.parametrize("name", TABS)
def test_a_telephone_shows_the_page_without_scrolling_sideways(studio, open_page, name, shots):
    page = open_page(studio.url).page
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("tab", name=name).click()
    page.wait_for_timeout(500)
    if shots is not None:
        page.screenshot(path=shots / f"{name.lower()}-390.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_keyboard_reaches_every_tab(studio, open_page):
    page = open_page(studio.url).page
    page.get_by_role("tab", name="Train").focus()
    for name in TABS[1:]:
        page.keyboard.press(
            "Tab" if page.get_by_role("tab", name=name).get_attribute("tabindex") == "0" else "ArrowRight"
        )
        focused = page.evaluate("document.activeElement.textContent.trim()")
        assert focused == name
        page.keyboard.press("Enter")
        assert page.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"
