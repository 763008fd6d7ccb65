"""Batch scripts do what they say, whatever stands in paths and settings; commands in job files are clear or refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from errors_helper import raises_code
from launch_helper import check_bash, in_bash, make_job, script
from pipeline_helper import cryoiso_here

from cryoiso.core.commands import COMMANDS, fill_words, split_command
from cryoiso.core.config import parse_job
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError, UsageError
from cryoiso.pipeline.batch import launch
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.stages.post_command import arguments, check_template

SCHEDULERS = ("slurm", "pbs", "lsf", "mpirun")
EVIL = "a$(touch PWNED)`touch PWNED`;touch PWNED&'b"
FILES = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}}


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path / "data")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("key", ["name", "account", "queue", "gpu_type"])
@pytest.mark.parametrize("value", ["gpu\ntouch PWNED\n", "x;touch PWNED", "$(touch PWNED)", "q w", 'a"b', "a\x1b[2Jb"])
def test_a_name_with_anything_else_in_it_is_refused(scheduler, key, value, job):
    given = {"scheduler": scheduler, "gpus": 1, key: value}
    if key == "name":  # of this one, other characters become hyphens
        text = script(job, **given)
        check_bash(text)
        assert not any(bad in text for bad in ("\ntouch", ";touch", "$(touch", "q w", 'a"b', "\x1b"))
        return
    with pytest.raises(UsageError, match=f"launch.{key}: not a valid name for a batch system"):
        script(job, **given)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "given", [{"extra": ["--x\ntouch PWNED"]}, {"modules": ["a\ntouch PWNED"]}, {"program": "cryoiso\ntouch 'PWNED\n'"},
              {"variables": {"more": "a\nb"}}, {"mpirun": "mpirun -n {ranks} 'x\ny'"}],
)  # fmt: skip
def test_no_value_begins_a_line_of_its_own(scheduler, given, job):
    """Blanks between words may be line breaks; within a value they may not."""
    try:
        text = script(job, scheduler=scheduler, **given)
    except UsageError as error:
        assert "has a line break or another control character" in str(error)
    else:
        assert "program" in given and "\ntouch" not in text


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["a\ntouch PWNED\n", "a\rb", "a\x1b]0;x\x07"])
def test_no_path_begins_a_line_of_its_own(scheduler, name, tmp_path):
    with raises_code("unsafe-for-batch-script", UsageError):
        script(make_job(tmp_path / name), scheduler=scheduler)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_paths_and_modules_are_quoted(scheduler, tmp_path):
    """The script is run, with a stand-in for the batch system: nothing but the program is started."""
    job = make_job(tmp_path / EVIL)
    shell = in_bash(job, scheduler, "0 done\n", modules=[], mpirun="env")
    shell.communicate(timeout=60)
    assert not list(tmp_path.rglob("PWNED")) and not Path("PWNED").exists()
    assert (job.parent / "calls").read_text().count(f"run {job} --out {job.with_name('run')}") == 1
    text = script(job, scheduler=scheduler, modules=["gcc/12 openmpi", "a;touch PWNED"])
    assert "module load gcc/12 openmpi ||" in text and "module load 'a;touch' PWNED ||" in text


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
def test_the_second_script_of_a_chain_is_quoted_where_it_is_named(scheduler, tmp_path):
    job = make_job(tmp_path / EVIL)
    text = script(job, scheduler=scheduler, first=True)
    check_bash(text)
    lines = [line for line in text.splitlines() if "and after it" in line]
    assert len(lines) == 1 and lines[0].strip().startswith("'and after it /")
    done = subprocess.run(["bash", "-c", f"echo {lines[0].strip()}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.strip() == f"and after it {job.with_name('go.sh')}" and not (tmp_path / "PWNED").exists()


def test_what_slurm_replaces_in_names_of_logs_is_doubled(tmp_path):
    text = script(make_job(tmp_path / "50%j x"), scheduler="slurm")
    assert f'#SBATCH --output="{tmp_path}/50%%j x/run-%j.log"' in text


def test_a_quote_in_a_path_cannot_stand_in_a_line_for_the_batch_system(tmp_path):
    with pytest.raises(InputError, match="quotes and backslashes cannot stand"):
        script(make_job(tmp_path / 'a"b'), scheduler="slurm")


@pytest.mark.parametrize("form, word", [("{{{{ {} }}}}", "job_dir_abs"), ("XXX{}XXX", "outfile")])
def test_a_site_template_gets_no_path_that_a_shell_acts_upon(form, word, tmp_path):
    job = make_job(tmp_path / "a$(touch PWNED)")
    start = form.format("run_cmd" if "{" in form[0] else "command")
    (job.parent / "site.sh").write_text(f"cd {form.format(word)}\n{start}\n")
    with pytest.raises(InputError, match=rf"'{word}' would put \$ into the script.*touch PWNED"):
        script(job, template="site.sh")
    if "{" in form[0]:
        (job.parent / "site.sh").write_text(f"cd {{{{ {word}|sh }}}}\n{start}\n")
        check_bash(script(job, template="site.sh"))


@pytest.mark.parametrize(
    "text",
    ["{{ run_cmd.foo.bar }}",
     "{{ {}['a'] }}", "{{ nodes|round(method='x') }}", "{{ [1, 'a']|sort }}", "{{ nodes() }}",
     "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% for i in nodes %}{% endfor %}", "{{ '%d'|format('x') }}",
     "{% include '/etc/passwd' %}", "{% include '../../etc/passwd' %}",
     "{{ ''.__class__.__mro__[1].__subclasses__() }}",
     "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{% for a, b in [1] %}{% endfor %}"],
)  # fmt: skip
def test_a_site_template_with_a_mistake_is_one_clear_error(text, job):
    (job.parent / "site.sh").write_text("{{ run_cmd }}\n" + text + "\n")
    done = cryoiso_here("launch", "--template", job.parent / "site.sh", "--mpi", "mpirun", job)
    assert done.returncode == EXIT_INPUT and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "site.sh" in done.stderr and "root:" not in done.stdout


# --- commands and numbers in a job file


@pytest.mark.parametrize("section, key", COMMANDS)
def test_quotes_that_do_not_close_are_named_with_their_key(section, key, job):
    with pytest.raises(UsageError, match=f"'{section}.{key}': the quotes or backslashes do not close.*found \"x 'y"):
        parse_job({**FILES, section: {key: "x 'y {input} {output} {ranks}"}})
    job.write_text(job.read_text() + f'[{section}]\n{key} = "x \'y"\n')
    done = cryoiso_here("plan", job)
    assert done.returncode == EXIT_USAGE and f"{section}.{key}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["{ranks.foo}", "{ranks[0]}", "{ranks:>2000000000}", "{ranks!r}", "{", "}", "{0}",
                                  "{}",
                                  "{other}", "{ranks:02x}", "{ranks.__class__.__init__.__globals__}"])  # fmt: skip
def test_only_plain_placeholders_are_replaced(word, job):
    with pytest.raises(UsageError, match=r"launch\.mpirun: cannot be understood: .*known placeholders: {ranks}, "):
        script(job, mpirun=f"mpirun -n {word}")
    with pytest.raises(UsageError, match=r"auxiliary\.post_command: cannot be understood"):
        check_template("prog {input} {output} " + word.replace("ranks", "half"))


def test_placeholders_and_their_formats():
    words = arguments("p '{input}' {output} r{round:02d} h{half} {pixel_size} {{x}}", input="a b", output="o", half=1,
                      round=3, pixel_size="1.06")  # fmt: skip
    assert words == ["p", "a b", "o", "r03", "h1", "1.06", "{x}"]
    assert fill_words(["{n:5}|{x:.2f}"], {"n": 7, "x": 1.236}, "k") == ["    7|1.24"]
    with raises_code("command-malformed", UsageError, match="k: a control character"):
        split_command("a\0b", "k")
    with pytest.raises(UsageError, match="pixel_size"):
        check_template("p {input} {output} {pixel_size:d}")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    "section, key",
    [("sample", "diameter_A"), ("reference", "lowpass_A"), ("launch", "ram_gb"), ("micelle", "threshold"),
                     ("run", "stop_before_end_s"), ("refine", "finest_step_deg")],
)  # fmt: skip
def test_numbers_are_finite(section, key, value, job):
    text = job.read_text().replace(f"[{section}]", f"[{section}]\n{key} = {value}")
    job.write_text(text if f"[{section}]" in text else f"{text}[{section}]\n{key} = {value}\n")
    with pytest.raises(UsageError, match=f"job.toml: '{section}.{key}': Input should be .*found {value}"):
        read_job(job)


def test_a_job_file_with_a_byte_order_mark_is_read(job):
    plain = read_job(job)
    job.write_bytes(b"\xef\xbb\xbf" + job.read_bytes())
    assert read_job(job) == plain


def test_a_job_file_nested_without_end_is_no_toml(job):
    job.write_text("a = " + "[" * 50000)
    with pytest.raises(UsageError, match=r"job\.toml: not a TOML file"):
        read_job(job)


def test_a_chain_of_good_names_is_as_before(job):
    text = script(job, scheduler="slurm", gpus=1, gpu_type="nvidia_a100_3g.20gb", account="lab+7@x", queue="a,b/c")
    for line in ("--gres=gpu:nvidia_a100_3g.20gb:1", "--account=lab+7@x", "--partition=a,b/c"):
        assert f"#SBATCH {line}\n" in text
    assert launch.seconds_of("24:00:00") == 86400
