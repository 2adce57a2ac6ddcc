"""Tasks: the noise is what the formula says, draws are nested and reproducible, and bad data is named by line."""

from __future__ import annotations

import html
import itertools
import json
import sys

import numpy as np
import pytest

from ntkft import assets, corpora
from ntkft.errors import InputError
from ntkft.tasks import Task, load_task, sampling_variance

SIZES = {"amazon": (3708, 11), "movies": (10605, 2), "nyt": (5190, 72), "tweets": (4200, 0)}
# 71 repeated texts in nyt as they are in the file, and one more after "&amp;amp;" became "&"
NOISE = {"amazon": 0.549, "movies": 0.892, "nyt": 0.625, "tweets": 0.739}  # over all texts, repeated ones too


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return str(path)


# ---------------------------------------------------------------- the rated corpora


@pytest.mark.parametrize("name", corpora.RATED)
def test_rated_corpus(name):
    task = load_task(name)
    total, repeated = SIZES[name]
    assert len(task) == total - repeated == task.info["corpus_size"]
    assert task.info["duplicates_dropped"] == repeated and task.info["empty_dropped"] == 0
    assert task.info["published_mean_differs"] == (199 if name == "tweets" else 0)
    assert len(set(task.texts)) == len(task) and all(text.strip() == text != "" for text in task.texts)
    assert not any("&amp;" in text or "&#" in text or "\r" in text or "\ufeff" in text for text in task.texts)
    assert task.y.dtype == task.reference.dtype == np.float64
    assert task.ratings is not None
    assert set(task.y) <= set(range(-4, 5))
    np.testing.assert_allclose(
        task.reference, [ratings.mean() for ratings in task.ratings], rtol=0, atol=1e-15
    )
    # m = 1: the sampling variance is the population variance of the ratings
    assert task.noise_variance == pytest.approx(
        np.mean([ratings.var() for ratings in task.ratings]), rel=1e-12
    )
    assert task.noise_variance == pytest.approx(NOISE[name], abs=2e-3)
    assert np.mean((task.y - task.reference) ** 2) == pytest.approx(task.noise_variance, rel=0.05)


def test_texts_and_ratings_are_joined_by_id():
    folder = assets.fetch("icwsm14", quiet=True)
    reference = dict(
        zip(*(getattr(load_task("tweets"), part) for part in ("texts", "reference")), strict=True)
    )
    ratings = {}
    for line in (folder / "tweets_anonDataRatings.txt").read_text(encoding="utf-8-sig").split("\n"):
        if line:
            key, _, _, values = line.split("\t")
            ratings[key] = np.mean(json.loads(values))
    lines = (folder / "tweets_GroundTruth.txt").read_text(encoding="utf-8-sig").split("\n")
    for key, _, text in (line.split("\t") for line in lines if line):
        assert reference[html.unescape(html.unescape(text)).strip()] == pytest.approx(ratings[key], abs=1e-12)
    # one of the 199: published with mean 1.44, and with the standard deviation of 99 ratings whose mean is 2.26
    assert reference["Yay. Another good phone interview."] == pytest.approx(2.262626, abs=1e-6)
    assert reference["Anger is ugly."] == pytest.approx(-1.208333, abs=1e-6)
    assert any("&" in text for text in reference)


def test_the_noise_formula_is_the_variance_over_all_draws():
    ratings = [np.array([3.0, -1.0, 2.0, 2.0, 0.0]), np.array([1.0, 1.0, 4.0])]
    for m in (1, 2, 3):
        exact = [
            np.mean([(np.mean(draw) - r.mean()) ** 2 for draw in itertools.combinations(r, m)])
            for r in ratings
        ]
        assert sampling_variance(ratings, m) == pytest.approx(np.mean(exact), abs=1e-14)


def test_drawn_labels_have_the_stated_variance_and_no_bias():
    task = load_task("tweets", n=40, raters=3)
    draws = np.array([task.redraw(3, seed).y for seed in range(400)])  # (400, 40)
    error = draws - task.reference
    assert np.mean(error**2) == pytest.approx(task.noise_variance, rel=0.05)
    assert abs(error.mean()) < 5 * np.sqrt(task.noise_variance / error.size)
    correlation = np.corrcoef(error.T)  # raters of different texts are drawn independently
    assert np.abs(correlation[np.triu_indices(40, 1)]).mean() < 0.06


def test_smaller_is_a_prefix_and_seeds_differ():
    small, large = (load_task("movies", n=n, seed=5, raters=2) for n in (128, 256))
    assert large.texts[:128] == small.texts
    np.testing.assert_array_equal(large.y[:128], small.y)
    np.testing.assert_array_equal(large.reference[:128], small.reference)
    again, other = load_task("movies", n=128, seed=5, raters=2), load_task("movies", n=128, seed=6, raters=2)
    assert again.texts == small.texts and np.array_equal(again.y, small.y)
    assert len(set(other.texts) & set(small.texts)) < 20


def test_ratings_are_nested_and_independent_of_the_texts_around():
    task = load_task("amazon", n=60, seed=2)
    one, two = task.y, task.redraw(2, seed=2).y
    assert task.ratings is not None
    for first, mean, ratings in zip(one, two, task.ratings, strict=True):
        assert 2 * mean - first in ratings  # the second rater is one of those who are left
    np.testing.assert_array_equal(load_task("amazon", n=60, seed=2, raters=7).y, task.redraw(7, seed=2).y)
    part = task.subset([50, 3, 7])
    np.testing.assert_array_equal(part.redraw(4, 9).y, task.redraw(4, 9).y[[50, 3, 7]])
    assert not np.array_equal(task.redraw(1, seed=3).y, one)
    assert task.redraw(20, seed=1).noise_variance == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(task.redraw(20, seed=1).y, task.reference, atol=1e-15)


def test_the_global_generator_plays_no_part():
    np.random.seed(0)
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    first = load_task("nyt", n=50, raters=3)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before)
    np.random.seed(1)
    assert np.array_equal(load_task("nyt", n=50, raters=3).y, first.y)


def test_subset_split_and_repr():
    task = load_task("nyt", n=50, seed=1)
    part = task.subset(np.array([4, 0]))
    assert task.ratings is not None
    assert (
        part.texts == [task.texts[4], task.texts[0]]
        and part.reference.tolist() == task.reference[[4, 0]].tolist()
    )
    assert part.noise_variance == pytest.approx(np.mean([task.ratings[i].var() for i in (4, 0)]))
    for test, size in ((0.2, 10), (7, 7)):
        train, held = task.split(test, seed=3)
        assert (len(train), len(held)) == (50 - size, size)
        assert sorted(train.texts + held.texts) == sorted(task.texts)
        assert held.texts == task.split(test, seed=3)[1].texts != task.split(test, seed=4)[1].texts
    assert repr(task).startswith("Task('nyt', n=50, y in [") and "raters=1" in repr(task)
    assert not any(text in repr(task) for text in task.texts)
    for bad in (0, 50, 1.0, 0.0):
        with pytest.raises(InputError, match="whole number from 1 to 49"):
            task.split(bad)
    with pytest.raises(InputError, match="from 0 to 50 and the task has 50 texts"):
        task.subset([0, 50])
    with pytest.raises(InputError, match="2 texts and y has 3 entries"):
        Task("x", ["a", "b"], np.zeros(3), np.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "movies", "raters": 16}, "raters is 16 and .* 'movies' have only 15 ratings"),
        ({"name": "amazon", "raters": 0}, "raters is 0 and .* only 20 ratings"),
        ({"name": "amazon", "n": 3698}, "n is 3698 and task 'amazon' has 3697 distinct texts"),
        ({"name": "amazon", "n": 0}, "n is 0 "),
        ({"name": "amazon", "noise_variance": 1.0}, "measures its noise from the ratings"),
        ({"name": "amazon", "text_column": "text"}, "for your own data and 'amazon' is a packaged corpus"),
        (
            {"name": "tweet"},
            "no task is named 'tweet'; did you mean 'tweets'.* amazon, .* 'hf:NAME' works too",
        ),
        ({"name": "notes.txt"}, r"no task is named 'notes.txt': .*\.csv"),
        ({"name": "reuters", "raters": 2}, "raters is 2 and task 'reuters' has one label"),
        ({"name": "election", "noise_variance": -1.0}, "noise_variance is -1.0 and must be positive"),
        ({"name": "election", "noise_variance": float("nan")}, "must be positive and finite"),
        (
            {"name": "newsgroups:sci.med/sci.bio"},
            "got 'sci.med/sci.bio'; they are alt.atheism, .*talk.religion.misc",
        ),
        ({"name": "reuters:earn"}, "needs two of its classes and got 'earn'"),
        ({"name": "reuters:earn/earn"}, "needs two of its classes and got 'earn/earn'"),
    ],
)
def test_refusals_name_both_sides(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(**arguments)
    assert "\n" not in str(caught.value)


def test_redraw_without_ratings():
    with pytest.raises(
        InputError, match="'reuters' has no single ratings to redraw; amazon, movies, nyt, tweets"
    ):
        load_task("reuters", n=5).redraw(1, 0)


# ---------------------------------------------------------------- topics


@pytest.mark.parametrize(
    ("name", "corpus", "classes", "repeated"),
    [
        ("reuters", "reuters-r8", {"earn": 3915, "acq": 2285}, 15),
        ("reuters:gold/sugar", "reuters-r52", {"gold": 87, "sugar": 119}, 6),
        ("newsgroups", "20newsgroups", {"rec.autos": 989, "sci.space": 983}, 4),
        ("newsgroups:sci.space/rec.autos", "20newsgroups", {"sci.space": 983, "rec.autos": 989}, 4),
        ("election", "election-tweets-2016", {"HillaryClinton": 2628, "realDonaldTrump": 3086}, 8),
    ],
)
def test_two_classes(name, corpus, classes, repeated):
    task = load_task(name)
    positive, negative = classes
    assert task.info["corpus"] == corpus and task.info["class_counts"] == classes
    assert (
        task.info["classes"] == {positive: 1.0, negative: -1.0}
        and task.info["duplicates_dropped"] == repeated
    )
    assert ((task.y == 1).sum(), (task.y == -1).sum()) == (classes[positive], classes[negative])
    assert task.noise_variance is None and task.ratings is None
    np.testing.assert_array_equal(task.y, task.reference)
    assert load_task(name, n=30).texts == task.texts[:30]


def test_labels_belong_to_their_texts():
    autos = dict(zip(*(getattr(load_task("newsgroups"), part) for part in ("texts", "y")), strict=True))
    cars = [y for text, y in autos.items() if " honda " in text or " ford " in text]
    orbits = [y for text, y in autos.items() if " orbit " in text]
    assert np.mean(cars) > 0.8 and np.mean(orbits) < -0.8
    tweets = load_task("election")
    signed = [y for text, y in zip(tweets.texts, tweets.y, strict=True) if text.endswith("-H")]
    assert len(signed) > 20 and min(signed) == 1  # Clinton's own tweets were signed -H
    assert any(text.startswith('"') or "\n" in text or '"' in text for text in tweets.texts)


# ---------------------------------------------------------------- the reader's own data


def test_csv(tmp_path):
    path = write(
        tmp_path / "a.csv",
        '\ufeffid,Review,Stars\r\n1,"good, really",4\r\n\r\n2,"two\nlines",2.5\r\n3,naïve,-1\r\n',
    )
    task = load_task(path, noise_variance=0.25)
    assert dict(zip(task.texts, task.y, strict=True)) == {"good, really": 4, "two\nlines": 2.5, "naïve": -1}
    assert (
        task.noise_variance == 0.25
        and task.info["text_column"] == "Review"
        and task.info["label_column"] == "Stars"
    )
    assert load_task(path).noise_variance is None
    assert task.subset([0]).noise_variance == 0.25
    assert set(load_task(path, text_column="id", label_column="Stars").texts) == {"1", "2", "3"}


def test_other_separators_and_latin1(tmp_path):
    tsv = write(tmp_path / "a.tsv", "text\tlabel\ngood, bad\t1\nfoo\t2\n")
    excel = write(tmp_path / "b.csv", "text;label\nschön, ja;1\nfoo;2\n", encoding="latin-1")
    assert sorted(load_task(tsv).texts) == ["foo", "good, bad"]
    assert sorted(load_task(excel).texts) == ["foo", "schön, ja"]


def test_a_text_longer_than_the_csv_limit(tmp_path):
    import csv

    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"text,label\n{'x' * (limit + 1)},1\n")
    assert len(load_task(path).texts[0]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("form", ["jsonl", "json", "ndjson"])
def test_json(tmp_path, form):
    rows = [{"sentence": f"text {i}\u2028", "score": i / 10} for i in range(5)]
    content = (
        json.dumps(rows)
        if form == "json"
        else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
    )
    task = load_task(write(tmp_path / f"a.{form}", content))
    assert dict(zip(task.texts, task.y, strict=True)) == {f"text {i}": i / 10 for i in range(5)}


def test_own_tasks_are_nested_and_reproducible(tmp_path):
    path = write(tmp_path / "a.csv", "text,y\n" + "".join(f"t{i},{i}\n" for i in range(50)))
    small, large = load_task(path, n=10, seed=3), load_task(path, n=20, seed=3)
    assert small.texts == large.texts[:10] != load_task(path, n=10, seed=4).texts
    assert [f"t{y:.0f}" for y in small.y] == small.texts
    with pytest.raises(InputError, match=r"n is 51 and .* has 50 distinct texts"):
        load_task(path, n=51)
    with pytest.raises(InputError, match="raters is 2 and "):
        load_task(path, raters=2)


@pytest.mark.parametrize(
    ("words", "classes"), [(("pos", "neg"), ("neg", "pos")), (("True", "False"), ("False", "True"))]
)
def test_two_words(tmp_path, words, classes):
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"t{i},{words[i % 2]}\n" for i in range(5)))
    task = load_task(path)
    assert task.info["classes"] == {classes[0]: -1.0, classes[1]: 1.0}
    assert task.info["class_counts"] == {words[0]: 3, words[1]: 2}
    assert all(
        y == (1 if words[int(text[1]) % 2] == classes[1] else -1)
        for text, y in zip(task.texts, task.y, strict=True)
    )


def test_empty_and_repeated_texts_are_dropped_and_counted(tmp_path):
    task = load_task(write(tmp_path / "a.csv", "text,label\na,1\n  ,2\nb,2\na ,3\nb,2\n,\n"))
    assert dict(zip(task.texts, task.y, strict=True)) == {"a": 1, "b": 2}
    counts = ("duplicates_dropped", "conflicting_duplicates", "empty_dropped")
    assert [task.info[key] for key in counts] == [2, 1, 2]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (
            "csv",
            "text,label\na,1\nb,\nc,NaN\n",
            r"2 of 3 labels .* are missing \(line 3, 4\): fill them in or remove",
        ),
        ("csv", 'text,label\n"a\nb",1\nc,\n', r"are missing \(line 4\)"),
        ("csv", 'text,label\nok,1\n"a\nb",\n', r"are missing \(line 3\)"),
        ("jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}\n', r"1 of 2 labels .* missing \(line 3\)"),
        ("jsonl", '{"text": "a", "label": NaN}\n', "are missing"),
        ("csv", "text,label\na,inf\nb,1\n", r"1 of 2 labels .* are infinite \(line 2\)"),
        ("csv", "text,label\na,1\nb,two\n", r"are words and the others numbers \(line 3\)"),
        ("csv", "text,label\na,x\nb,y\nc,z\n", r"has 3 classes \(x, y, z\) and a task needs two"),
        ("csv", "text,label\na,x\nb,x\n", "has 1 classes"),
        (
            "csv",
            "words,label\na,1\n",
            "no column named text, sentence, .*; it has words, label: give text_column",
        ),
        ("csv", "text,value\na,1\n", "no column named label, y, .*; it has text, value: give label_column"),
        ("csv", "", "it has none"),
        ("csv", "text,label\n", "has no text in column 'text'"),
        ("csv", "text,label\na, b,1\n", "line 2 of .* has 3 fields and the header 2"),
        ("csv", 'text,label\nok,1\n"a"b,1\n', "line 3 of .* is not CSV"),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 of .* is not JSON"),
        ("jsonl", "[1, 2]\n", "entry 1 of .* is no JSON object"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, suffix, content, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(write(tmp_path / f"a.{suffix}", content))
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_columns_and_files_that_do_not_exist(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,1\n")
    with pytest.raises(InputError, match="no column 'stars'; it has text, label: give label_column"):
        load_task(path, label_column="stars")
    with pytest.raises(InputError, match=r"there is no file .*b.csv"):
        load_task(tmp_path / "b.csv")


def test_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(
        names=["positive", "negative"]
    )  # not in sorted order: the dataset's own order counts
    features = datasets.Features({"sentence": datasets.Value("string"), "label": kind})
    data = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "flat"))
    task = load_task(f"hf:{tmp_path / 'flat'}")
    assert dict(zip(task.texts, task.y, strict=True)) == {"a": -1, "b": 1, "c": 1}
    assert task.info["classes"] == {"positive": -1.0, "negative": 1.0}
    unlabelled = datasets.Dataset.from_dict({"sentence": ["d"], "label": [-1]}, features=features)
    datasets.DatasetDict({"train": data, "test": unlabelled}).save_to_disk(str(tmp_path / "both"))
    assert sorted(load_task(f"hf:{tmp_path / 'both'}@train").texts) == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"1 of 1 labels .* are missing"):
        load_task(f"hf:{tmp_path / 'both'}@test")
    with pytest.raises(InputError, match="with split 'dev' cannot be loaded"):
        load_task(f"hf:{tmp_path / 'both'}@dev")
    numbers = datasets.Dataset.from_dict({"text": ["a", "b"], "stars": [4, 2]})
    numbers.save_to_disk(str(tmp_path / "numbers"))
    assert sorted(load_task(f"hf:{tmp_path / 'numbers'}", noise_variance=0.5).y) == [2, 4]


def test_hub_names_and_configurations(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, split):
        calls.append((*arguments, split))
        if arguments == ("glue/sst2",):
            raise datasets.exceptions.DatasetNotFoundError("no such dataset")
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.5]})

    monkeypatch.delenv("NTKFT_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("hf:imdb@test", "hf:glue/sst2", "hf:nyu-mll/glue/sst2@validation"):
        assert len(load_task(name)) == 2
    assert calls == [
        ("imdb", "test"),
        ("glue/sst2", "train"),
        ("glue", "sst2", "train"),
        ("nyu-mll/glue", "sst2", "validation"),
    ]
    monkeypatch.setenv("NTKFT_OFFLINE", "1")
    with pytest.raises(InputError, match=r"'imdb' is no folder and NTKFT_OFFLINE forbids the network"):
        load_task("hf:imdb")
    assert len(calls) == 4


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets: pip install 'ntkft\[hub\]'"):
        load_task("hf:imdb")
