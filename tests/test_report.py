"""Tables and pages: numbers short, names escaped, everything in one file."""

import torch

from multiview.report import Figure, Table, write_page

EVIL = "<script>alert('x')</script>|"


def test_tables_read_in_a_terminal_and_in_markdown():
    table = Table("Quality", ["method", "dB"], [["hull", 21.4321], ["model|b", None]], notes=["64 mice"])
    assert table.text() == "Quality\nmethod   dB\nhull     21.4\nmodel|b  –\n64 mice\n"
    assert "| hull | 21.4 |" in table.markdown() and "| model\\|b | – |" in table.markdown()


def test_page_is_one_file_with_names_escaped(tmp_path):
    figures = [Figure(EVIL, torch.rand(3, 8, 8)), Figure("plot", svg="<svg/>")]
    blocks = [Table(EVIL, [EVIL], [[EVIL]], [EVIL]), *figures, EVIL]
    write_page(tmp_path / "report.html", EVIL, blocks, facts={EVIL: EVIL}, badge="poor")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 11 and "<svg/>" in page
    assert "data:image/jpeg;base64," in page and "http" not in page
