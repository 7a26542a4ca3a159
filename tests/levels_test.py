"""Coarser levels of a corpus: one `prepare`, several numbers of domains; what tells of them."""

import json

import numpy as np
import pytest
from conftest import tiny_config, topic_text

from soup_jax.cli import main as cli
from soup_jax.cli import plan
from soup_jax.data import domain_histogram, domain_map, domain_report
from soup_jax.data.corpus import open_corpus
from soup_jax.data.prepare import provenance, stages
from soup_jax.errors import UserError
from soup_jax.specialists.open import load
from soup_jax.training.loop import train

TOPICS = ("cooking", "sailing", "algebra", "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("levels")
    texts = [topic_text(topic, seed) for seed in range(60) for topic in TOPICS]
    (path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    stages.prepare(config(path))
    return path


def config(path, **changes):
    return tiny_config(
        **{
            "corpus.sources": (str(path / "text.jsonl"),),
            "corpus.dir": str(path / "corpus"),
            "corpus.levels": (4,),
            "corpus.num_workers": 1,
            "corpus.validation_fraction": 0.2,
            "num_domains": 12,
            "embed.dim": 16,
        }
        | changes
    )


def test_a_level_is_made_of_ranges_of_the_finest_domains(folder):
    fine, coarse = open_corpus(folder / "corpus"), open_corpus(folder / "corpus", num_domains=4)
    assert (fine.num_domains, coarse.num_domains) == (12, 4)
    assert fine.fingerprint != coarse.fingerprint
    ranges = fine.tree().ranges(0)
    for split in fine.offsets:
        np.testing.assert_array_equal(coarse.offsets[split], fine.offsets[split][ranges])
        records = np.arange(fine.offsets[split][-1])
        np.testing.assert_array_equal(
            coarse.num_targets(split, records), fine.num_targets(split, records)
        )
        # Every token is a target once: padding is where the finest domains end.
        tokens = sum(entry["tokens"][split] for entry in coarse.domains)
        assert fine.num_targets(split, records).sum() == tokens
    for k, entry in enumerate(coarse.domains):
        below = fine.domains[ranges[k] : ranges[k + 1]]
        assert entry["documents"]["train"] == sum(e["documents"]["train"] for e in below)
    np.testing.assert_allclose(coarse.domain_frequencies.sum(), 1)
    assert coarse.centroids().shape == (4, 16)
    # Documents of a topic lie in one domain of four, and below it.
    texts = [topic_text("sailing", seed) for seed in range(500, 520)]
    h_fine = domain_histogram.document_histogram(fine, texts).h_K
    h_coarse = domain_histogram.document_histogram(coarse, texts).h_K
    np.testing.assert_allclose(np.add.reduceat(h_fine, ranges[:-1]), h_coarse, atol=1e-12)
    assert h_coarse.max() > 0.95
    assert "sail" in " ".join(coarse.domains[int(h_coarse.argmax())]["terms"])
    assert coarse.similarity_quantiles() != fine.similarity_quantiles()
    with pytest.raises(ValueError, match="not in tuple"):
        fine.level(5)


def test_a_run_at_a_level_keeps_it(folder):
    cfg = config(folder, num_domains=4, num_steps=4, num_experts=2)
    train(cfg, folder / "run")
    kept = domain_map.open_map(folder / "run" / "domains")
    coarse = open_corpus(folder / "corpus", num_domains=4)
    assert kept.fingerprint == coarse.fingerprint
    assert [kept.label(k) for k in range(4)] == [coarse.label(k) for k in range(4)]
    np.testing.assert_array_equal(kept.centroids(), coarse.centroids())
    assert kept.similarity_quantiles() == coarse.similarity_quantiles()
    soup = load(folder / "run")
    assert soup.num_domains == 4
    assert soup.corpus.fingerprint == kept.fingerprint
    with pytest.raises(UserError, match="num_domains is 5, the corpus has 12 or 4"):
        train(config(folder, num_domains=5, num_steps=4), folder / "other")


def test_levels_that_cannot_be_are_refused_and_others_are_another_corpus(folder):
    for levels in ((12,), (4, 4), (8, 4), (4.0,), (0,), (-2,)):
        with pytest.raises(UserError, match="ascending numbers of domains below num_domains = 12"):
            provenance.check(config(folder, **{"corpus.levels": levels}))
    with pytest.raises(UserError, match=r"corpus.levels: \(4,\), now \(3,\)"):
        stages.prepare(config(folder, **{"corpus.levels": (3,)}))
    assert stages.prepare(config(folder)).num_domains == 12


def test_domains_are_listed_and_drawn(folder, capsys):
    corpus, picture = f"--corpus={folder / 'corpus'}", folder / "domains.png"
    arguments = [corpus, f"--picture={picture}", f"--json={folder / 'domains.json'}", "--most=5"]
    assert cli.run(["domains", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5 + 1 + 1 + 2
    assert lines[6].endswith(" 7 more")
    assert "12 domains of " in lines[7]
    assert "Gini coefficient 0." in lines[7]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "domains.json").read_text())
    assert sum(row["share"] for row in found["domains"]) == pytest.approx(1)
    assert [r["share"] for r in found["domains"]] == sorted(
        (r["share"] for r in found["domains"]), reverse=True
    )
    assert cli.run(["domains", corpus, "--num_domains=4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1
    for arguments, message in (
        ([], "--corpus=DIR"),
        ([corpus, "--num_domains=5"], "no level of 5 domains; it has 4, 12"),
        ([corpus, "--picture=x.txt"], "must end in .png"),
        (["--run=nowhere"], "nowhere is not a run"),
    ):
        assert cli.run(["domains", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_histogram_has_a_band_and_its_weights_are_a_file_to_train_by(folder, capsys):
    mine = folder / "mine.jsonl"
    texts = [topic_text(t, 900 + i) for i in range(15) for t in ("algebra", "python")]
    mine.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out, arguments = folder / "h.json", [str(mine), f"--corpus={folder / 'corpus'}"]
    assert cli.run(["histogram", *arguments, "--num_domains=4", f"--json={out}"]) == 0
    printed = capsys.readouterr().out
    assert "30 documents" in printed
    assert "less than 9.5%" in printed  # 1 - 0.05 ** (1 / 30)
    h_K = np.array(json.loads(out.read_text()))
    assert h_K.sum() == pytest.approx(1)
    assert sorted(h_K)[-2:] == pytest.approx([0.5, 0.5], abs=0.1)
    weights = {"domain_weights.path": str(out), "domain_weights.file": 1.0}
    weights |= {"domain_weights.sparse": 0.0, "domain_weights.generic": 0.0, "num_domains": 4}
    corpus = open_corpus(folder / "corpus", num_domains=4)
    assert domain_report.from_config(config(folder, **weights), corpus.domain_frequencies)


def test_the_band_covers_what_other_samples_give(folder):
    corpus = open_corpus(folder / "corpus", num_domains=4)
    rng = np.random.default_rng(0)
    pool = [topic_text(t, 2000 + i) for i in range(50) for t in ("algebra", "algebra", "python")]
    true_K = domain_histogram.document_histogram(corpus, pool).h_K
    covered = []
    for _ in range(40):
        texts = [pool[i] for i in rng.choice(len(pool), 30, replace=False)]
        found = domain_histogram.document_histogram(corpus, texts, resamples=300)
        for k in np.flatnonzero(true_K > 0.1):
            covered.append(found.low_K[k] <= true_K[k] <= found.high_K[k])
    assert 0.8 < np.mean(covered) <= 1


def test_one_percent_of_the_documents_to_come_count_as_outside(folder):
    # Documents like those of the corpus, which it has not seen.
    corpus = open_corpus(folder / "corpus", num_domains=4)
    texts = [topic_text(topic, 5000 + i) for i in range(250) for topic in TOPICS]
    found = domain_histogram.document_histogram(corpus, texts)
    assert found.outside < 0.05
    strange = [" ".join(reversed(text.split()))[::-1] for text in texts[:20]]
    assert domain_histogram.document_histogram(corpus, [*texts[:20], *strange]).outside > 0.3


def test_domains_that_a_run_repeats_too_often_are_named(folder, capsys):
    corpus = open_corpus(folder / "corpus")
    assert domain_report.repetition_warning(config(folder, num_steps=1), corpus) == ""
    cfg = config(folder, num_steps=100_000, batch_size=64)
    warning = domain_report.repetition_warning(cfg, corpus)
    to_be_written = {"domain_weights.path": "nowhere.json", "domain_weights.file": 0.2}
    to_be_written |= {"domain_weights.generic": 0.0}
    assert domain_report.repetition_warning(config(folder, **to_be_written), corpus) == ""
    assert warning.startswith("12 of 12 domains will be seen more than 10 times")
    assert plan.repetition(cfg) == warning  # which `plan` prints
    assert plan.repetition(config(folder, **{"corpus.dir": str(folder / "nothing")})) == ""
    # All draws of one domain, and none of the others.
    meta = domain_report.from_config(cfg, corpus.domain_frequencies)
    windows_K = np.diff(corpus.offsets["train"])
    found = domain_report.epochs(meta, windows_K, 1000)
    assert found @ windows_K == pytest.approx(1000)
