"""Projections on a book: products with its table, however many rows are made at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deltaserve_kernels.codebook_matmul.project import project
from deltaserve_kernels.fused.parts import BookForm
from deltaserve_kernels.terms import Book


@pytest.mark.parametrize("form", [BookForm(Book(), 9, 2, 33, 3), BookForm(Book("seeded", 3), 4, 1, 131, 1)], ids=str)
def test_projections_are_products_with_the_table_in_pieces_too(form: BookForm, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 98, generator=torch.Generator().manual_seed(0)).half()
    whole = project(x, form)
    monkeypatch.setattr("deltaserve_kernels.codebook_matmul.project.CHUNK_PRODUCTS", 5 * form.width + 1)
    assert torch.equal(project(x, form), whole)
    table = form.book.table(form.index_bits, form.tile * form.length).view(-1, form.tile, form.length)
    segments = F.pad(x.float(), (0, form.segments * form.length - 98)).view(37, form.segments, form.length)
    expected = torch.einsum("tsj,crj->tscr", segments, table).flatten(1) * 2.0**-form.shift
    assert (whole - expected).norm() < 1e-3 * expected.norm()
