"""Files of results: what a run that was killed leaves of its last line does not spoil the rest."""

from benchmarks import result_lines


def test_lines(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    assert result_lines.read(path) == []
    result_lines.append(path, [{"task": "é"}, {"task": 2}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"task": ')
    assert result_lines.read(path) == [{"task": "é"}, {"task": 2}]
    result_lines.append(path, [{"task": 3}])
    assert result_lines.read(path) == [{"task": "é"}, {"task": 2}, {"task": 3}]
    result_lines.write(path, [{"task": 4}])
    assert result_lines.read(path) == [{"task": 4}] and [each.name for each in path.parent.iterdir()] == [path.name]
