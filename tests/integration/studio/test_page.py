"""The page opens in a browser without errors, without a request elsewhere, and behind its gate."""

import pytest
import requests


def test_the_page_opens_with_its_tabs(studio, open_page):
    page = open_page(studio.url).page
    for name in ("Train", "Generate", "Library"):
        page.get_by_role("tab", name=name).click()
        assert page.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_a_page_of_another_site_is_refused(studio, headers):
    answer = requests.get(studio.url, headers=headers, timeout=10)
    assert answer.status_code == 403
    assert "local programs" in answer.text
