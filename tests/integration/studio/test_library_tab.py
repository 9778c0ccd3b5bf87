"""The tab Library in a browser: cards, facts, rename, trash, import, export, comparison, tuners of runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from restune_diffusion import ResConfig, SkipConfig, Tuner, load_tuner, save_tuner
from restune_diffusion.conversion.bases import describe_checkpoint
from restune_diffusion.conversion.formats import export_tuner
from restune_diffusion.storage.base_files.location import BUNDLED_BASE

from ...conftest import make_unet, randomize


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuners")
    info = describe_checkpoint(str(BUNDLED_BASE))
    lora = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2)
    for name, config in (("ink", SkipConfig()), ("lora", lora)):
        tuner = Tuner((config,), info)
        randomize(tuner)
        save_tuner(tuner, folder / f"{name}.safetensors", training={"trigger_words": ["ink style"]})
    save_tuner(Tuner.for_base(make_unet(), SkipConfig()), folder / "foreign.safetensors")
    export_tuner(load_tuner(folder / "lora.safetensors"), folder / "kohya.safetensors", "kohya")
    (folder / "model.ckpt").write_bytes(b"\x80\x02")
    return folder


@pytest.fixture
def tab(studio, open_page, files):
    """The tab with the tuners `ink`, `lora` and `foreign`."""
    shutil.rmtree(studio.home / "tuners")
    (studio.home / "tuners").mkdir()
    for name in ("ink", "lora", "foreign"):
        shutil.copy(files / f"{name}.safetensors", studio.home / "tuners")
    page = open_page(studio.url).page
    page.get_by_role("tab", name="Library").click()
    card(page, "ink").wait_for()
    return page


def card(page, name):
    return page.locator(f'[data-tuner="{name}"]')


def select(page, name):
    # With the keyboard, as for all cards.
    card(page, name).press("Enter")
    page.locator("#library-facts dd", has_text=name).first.wait_for()


def toast(page, text):
    page.locator(".toast-body", has_text=text).first.wait_for()


def test_a_tuner_is_found_renamed_deleted_and_restored(tab, studio):
    tab.get_by_label("Search").fill("ink style skip")
    card(tab, "lora").wait_for(state="detached")
    select(tab, "ink")
    assert card(tab, "ink").get_attribute("aria-pressed") == "true"
    assert "Fits the base" in tab.locator("#library-facts").inner_text()
    new_name = tab.locator("#library-new-name textarea, #library-new-name input").first
    expect(new_name).to_have_value("ink")
    new_name.fill("styles/tinte")
    tab.locator("#library-rename").click()
    card(tab, "styles/tinte").wait_for()
    tab.get_by_role("button", name="Move to trash").click()
    card(tab, "styles/tinte").wait_for(state="detached")
    assert not (studio.home / "tuners" / "styles" / "tinte.safetensors").exists()
    tab.locator("#library-trash button").first.click()
    tab.locator("#library-deleted input").click()
    tab.get_by_role("option", name="styles/tinte").click()
    tab.locator("#library-restore").click()
    card(tab, "styles/tinte").wait_for()
    assert (studio.home / "tuners" / "styles" / "tinte.safetensors").is_file()


def test_a_tuner_that_does_not_fit_names_the_reason(tab):
    assert "Cannot be used" in card(tab, "foreign").inner_text()
    select(tab, "foreign")
    assert "This tuner was made for a base with" in tab.locator("#library-facts").inner_text()


def test_files_are_imported_or_refused_with_a_sentence(tab, studio, files):
    tab.locator("#library-upload input[type=file]").set_input_files(
        [files / "kohya.safetensors", files / "model.ckpt"]
    )
    card(tab, "kohya").wait_for()
    toast(tab, "pickle")
    imported = load_tuner(studio.home / "tuners" / "kohya.safetensors").state_dict()
    ours = load_tuner(files / "lora.safetensors").state_dict()
    assert all(torch.allclose(imported[key], ours[key], atol=1e-6) for key in ours)


def test_a_lora_is_downloaded_in_the_layout_of_other_programs(tab, tmp_path):
    select(tab, "lora")
    tab.get_by_label("LoRA for ComfyUI, A1111").check()
    tab.get_by_role("button", name="Prepare download").click()
    with tab.expect_download() as download:
        tab.locator("#library-download").click()
    download.value.save_as(tmp_path / "file.safetensors")
    assert download.value.suggested_filename == "lora-kohya.safetensors"
    assert (tmp_path / "file.safetensors").read_bytes()[8:200].find(b"lora_unet_") > 0


def test_a_tuner_from_elsewhere_is_there_when_the_tab_is_opened(tab, studio, files):
    tab.get_by_role("tab", name="Train").click()
    shutil.copy(files / "ink.safetensors", studio.home / "tuners" / "new.safetensors")
    tab.get_by_role("tab", name="Library").click()
    card(tab, "new").wait_for()


def test_two_tuners_are_compared_with_the_base_on_the_same_seeds(tab):
    select(tab, "ink")
    tab.get_by_label("Second tuner").click()
    tab.get_by_role("option", name="lora").click()
    tab.locator("#library-prompt textarea").fill("fox, ink style")
    tab.locator("#library-steps").get_by_label("number input for Steps").fill("2")
    tab.get_by_role("button", name="Compare with the base").click()
    tab.locator("#library-compared img").nth(5).wait_for(timeout=60_000)
    table = tab.locator("#library-compared")
    assert table.locator("thead th").all_inner_texts() == ["Base", "ink", "lora"]
    assert table.locator("tbody th").all_inner_texts() == ["Seed 0", "Seed 1"]
    sources = [image.get_attribute("src") for image in table.locator("img").all()]
    assert len(set(sources)) == 6
    # The base is as before: the same image again.
    tab.get_by_role("button", name="Make a thumbnail").click()
    card(tab, "ink").locator("img").wait_for(timeout=60_000)


def test_a_tuner_of_a_run_is_added_with_one_click(tab, studio, files):
    run = studio.home / "runs" / "my-cat"
    (run / "samples" / "step-000002").mkdir(parents=True)
    Image.new("RGB", (64, 64), "teal").save(run / "samples" / "step-000002" / "00.png")
    shutil.copy(files / "ink.safetensors", run / "tuner.safetensors")
    tab.get_by_role("button", name="Reload").click()
    tab.get_by_label("Tuner of a run").click()
    tab.get_by_role("option", name="my-cat/tuner").click()
    tab.get_by_role("button", name="Add to library").click()
    card(tab, "my-cat").locator("img").wait_for()
