"""From a command line to one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.launch import cmd_args
from modules.launch.cmd_args import NO_EFFECT, NOT_YET, FlagError, build_parser, config_for_tests, parse_config, split_command_line


def config_of(*words: str, **environ: str) -> AppConfig:
    return parse_config(words, environ)


def error_of(*words: str, **environ: str) -> str:
    with pytest.raises(FlagError) as caught:
        parse_config(words, environ)
    return str(caught.value)


def test_defaults_are_what_a_user_finds() -> None:
    config = config_of()
    assert (config.host, config.port, config.listen_port) == ("127.0.0.1", None, 7860)
    assert (config.data_dir, config.models_dir) == (SCRIPT_DIR, SCRIPT_DIR / "models")
    assert (config.settings_file, config.ui_config_file) == (SCRIPT_DIR / "config.json", SCRIPT_DIR / "ui-config.json")
    assert (config.styles_files, config.outputs_dir) == ((SCRIPT_DIR / "styles.csv",), SCRIPT_DIR / "outputs")
    assert (config.loglevel, config.timeout_keep_alive_s, config.filenames_max_length) == ("INFO", 30, 128)
    assert (config.disable_extension_access, config.notices) == (False, ())


def test_nowebui_has_its_own_port() -> None:
    assert config_of("--nowebui").listen_port == 7861
    assert config_of("--nowebui", "--port", "80").listen_port == 80


def test_listen_opens_to_others_and_closes_the_extensions_tab() -> None:
    assert (config_of("--listen").host, config_of("--listen").disable_extension_access) == ("0.0.0.0", True)
    assert config_of("--listen", "--enable-insecure-extension-access").disable_extension_access is False
    assert config_of("--listen", "--server-name", "::1").host == "::1"


def test_folders_follow_the_data_folder(tmp_path: Path) -> None:
    config = config_of("--data-dir", str(tmp_path))
    assert config.ckpt_dirs == (tmp_path / "models" / "Stable-diffusion",)
    assert config.vae_dirs == (tmp_path / "models" / "VAE",)
    assert config.text_encoder_dirs == (tmp_path / "models" / "text_encoder",)
    assert config.lora_dirs == (tmp_path / "models" / "Lora",)
    assert config.controlnet_dirs == (tmp_path / "models" / "ControlNet",)
    assert config.embeddings_dirs == (tmp_path / "embeddings",)
    assert config.extensions_dir == tmp_path / "extensions"
    assert config.flags["esrgan_models_path"] == str(tmp_path / "models" / "ESRGAN")


def test_named_folders_come_after_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = config_of(
        "--data-dir", str(tmp_path), "--models-dir", str(tmp_path / "m"), "--lora-dir", str(tmp_path / "a"), "--lora-dir", str(tmp_path / "b")
    )
    assert config.lora_dirs == (tmp_path / "m" / "Lora", tmp_path / "a", tmp_path / "b")
    assert config.flags["lora_dir"] == str(tmp_path / "b")
    assert any(notice.startswith(f"--lora-dir {tmp_path / 'b'}: there is no such folder") for notice in config.notices)
    assert not any(notice.startswith(f"--lora-dir {tmp_path / 'a'}") for notice in config.notices)


def test_flags_for_extensions_have_the_defaults_they_expect(tmp_path: Path) -> None:
    flags = config_of("--data-dir", str(tmp_path)).flags
    assert (flags["ckpt_dir"], flags["controlnet_dir"]) == (None, None)
    assert flags["lora_dir"] == str(tmp_path / "models" / "Lora")
    assert flags["embeddings_dir"] == str(tmp_path / "embeddings")
    assert flags["hypernetwork_dir"] == str(tmp_path / "models" / "hypernetworks")
    assert (flags["no_half"], flags["medvram"], flags["lowvram"], flags["medvram_sdxl"], flags["use_cpu"], flags["api_auth"]) == (
        False,
        False,
        False,
        False,
        [],
        None,
    )


def test_an_a1111_installation_lends_the_folders_it_has(tmp_path: Path) -> None:
    (tmp_path / "models" / "Stable-diffusion").mkdir(parents=True)
    (tmp_path / "embeddings").mkdir()
    config = config_of("--forge-ref-a1111-home", str(tmp_path))
    assert config.ckpt_dirs[1:] == (tmp_path / "models" / "Stable-diffusion",)
    assert config.embeddings_dirs[1:] == (tmp_path / "embeddings",)
    assert config.vae_dirs[1:] == ()
    assert "no models folder" in error_of("--forge-ref-a1111-home", str(tmp_path / "embeddings"))


def test_a_checkpoint_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "Stable-diffusion"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").touch()
    assert config_of("--data-dir", str(tmp_path), "--ckpt", "a.safetensors").ckpt == folder / "a.safetensors"
    assert config_of("--ckpt", str(folder / "a.safetensors")).ckpt == folder / "a.safetensors"
    message = error_of("--data-dir", str(tmp_path), "--ckpt", "b.safetensors")
    assert "b.safetensors" in message
    assert "It contains: a.safetensors." in message


def test_the_command_line_wins_over_the_variable() -> None:
    config = config_of("--port", "2", COMMANDLINE_ARGS="--port 1 --api")
    assert (config.port, config.api) == (2, True)


def test_backslashes_are_parts_of_paths_on_windows_only() -> None:
    assert split_command_line(r"--data-dir C:\new\a", windows=True) == ["--data-dir", r"C:\new\a"]
    assert split_command_line(r'--data-dir "C:\my data"', windows=True) == ["--data-dir", r"C:\my data"]
    assert split_command_line(r"a\ b", windows=False) == ["a b"]


def test_logins_are_read_from_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "logins").write_text("carl:c\ndora:d, eve:e\n")
    config = config_of("--api-auth", "ann:a,bob:b:b", "--gradio-auth", "x:y", "--gradio-auth-path", str(tmp_path / "logins"))
    assert config.api_auth == (("ann", "a"), ("bob", "b:b"))
    assert config.gradio_auth == (("x", "y"), ("carl", "c"), ("dora", "d"), ("eve", "e"))


def test_logins_of_the_api_are_read_from_a_file_and_stay_out_of_the_process_list(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_bytes(b"\xef\xbb\xbfann:a\r\nbob:b:b, carl:c\n\n")
    assert config_of("--api", "--api-auth-file", str(file)).api_auth == (("ann", "a"), ("bob", "b:b"), ("carl", "c"))
    both = config_of("--api-auth", "dora:d", "--api-auth-file", str(file))
    assert both.api_auth == (("dora", "d"), ("ann", "a"), ("bob", "b:b"), ("carl", "c"))
    assert "ann" not in repr(both)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "contains no login"), (b"\n , \n", "contains no login"), (b"\xff\xfe", "cannot be read as UTF-8"), (b"ann", "")],
)
def test_a_file_of_logins_without_one_ends_the_start(content: bytes, says: str, tmp_path: Path) -> None:
    """Whoever names a file wants a password: without one the API must not be open."""
    file = tmp_path / "logins"
    file.write_bytes(content)
    for flag in ("--api-auth-file", "--gradio-auth-path"):
        message = error_of(flag, str(file))
        assert flag in message and says in message


def test_no_password_is_printed() -> None:
    assert "secret" not in error_of("--api-auth", "ann:secret,bob")
    assert "secret" not in repr(config_of("--api-auth", "ann:secret", "--gradio-auth", "bob:secret"))


def test_server_flags_reach_their_fields(tmp_path: Path) -> None:
    for name in ("key", "cert"):
        (tmp_path / name).touch()
    config = config_of(
        *("--subpath", "/sd/", "--cors-allow-origins", "http://a, http://b", "--cors-allow-origins-regex", "http://.*"),
        *(
            "--tls-keyfile",
            str(tmp_path / "key"),
            "--tls-certfile",
            str(tmp_path / "cert"),
            "--gradio-allowed-path",
            "/x",
            "--gradio-allowed-path",
            "/y",
        ),
        *("--theme", "dark", "--timeout-keep-alive", "5", "--api-log", "--api-server-stop", "--share", "--autolaunch", "--allow-code"),
    )
    assert (config.subpath, config.cors_origins, config.cors_origins_regex) == ("sd", ("http://a", "http://b"), "http://.*")
    assert (config.tls_keyfile, config.tls_certfile) == (tmp_path / "key", tmp_path / "cert")
    assert (config.gradio_allowed_paths, config.theme, config.timeout_keep_alive_s) == (("/x", "/y"), "dark", 5)
    assert config.api_log and config.api_server_stop and config.share and config.autolaunch and config.allow_code


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lsten"], "did you mean --listen?"),
        (["--xformer"], "did you mean --xformers?"),
        (["--medvarm=1"], "did you mean --medvram?"),
        (["word"], "word: there is no such flag."),
        (["--port", "abc"], "--port"),
        (["--port", "0"], "from 1 to 65535"),
        (["--port", "70000"], "from 1 to 65535"),
        (["--theme", "blue"], "'blue'"),
        (["--device-id", "0,0"], "--allow-shared-slots"),
        (["--multi-gpu-strategy", "best"], "'best'"),
        (["--tls-keyfile", "/no"], "--tls-certfile is missing"),
        (["--tls-keyfile", "/no", "--tls-certfile", "/no"], "no such file"),
        (["--gradio-auth-path", "/no"], "no such file"),
        (["--api-auth-file", "/no"], "no such file"),
        (["--cors-allow-origins-regex", "("], "not a regular expression"),
        (["--filenames-max-length", "0"], "from 8 to 255"),
        (["--timeout-keep-alive", "-1"], "from 1 to 86400"),
        (["--loglevel", "loud"], "--loglevel"),
        (["--data-dir", __file__], "this is a file"),
    ],
)
def test_mistakes_say_what_to_do(words: list[str], says: str) -> None:
    assert says in error_of(*words)


def test_the_environments_mistakes_name_the_variable() -> None:
    assert "COMMANDLINE_ARGS" in error_of(COMMANDLINE_ARGS="--ckpt 'a")
    assert "SD_WEBUI_LOG_LEVEL" in error_of(SD_WEBUI_LOG_LEVEL="loud")
    assert config_of(SD_WEBUI_LOG_LEVEL="debug").loglevel == "DEBUG"


def test_unknown_flags_can_be_ignored() -> None:
    config = config_of("--lsten", "--api", IGNORE_CMD_ARGS_ERRORS="1")
    assert config.api
    assert "--lsten" in config.notices[0]


@pytest.mark.parametrize("flag", sorted(NO_EFFECT))
def test_a_flag_without_effect_says_so_once(flag: str) -> None:
    words = [flag, "1"] if NO_EFFECT[flag][0] else [flag]
    assert [notice.split()[0] for notice in config_of(*words, *words).notices] == [flag]


def test_a_flag_whose_part_is_not_there_yet_says_so() -> None:
    for flag in NOT_YET:
        action = next(action for action in build_parser()._actions if flag in action.option_strings)
        words = [flag] if action.nargs == 0 else [flag, str((action.choices or ["x"])[0])]
        assert any(notice.startswith(f"{flag} has no effect yet: ") for notice in config_of(*words, "--multi-gpu").notices)


def test_flags_that_need_another_one_say_so() -> None:
    assert any("without --multi-gpu" in notice for notice in config_of("--multi-gpu-strategy", "layers").notices)
    assert not any("without --multi-gpu" in notice for notice in config_of("--multi-gpu-strategy", "layers", "--multi-gpu").notices)
    assert "interrogate" in config_of("--use-cpu", "interrogate").notices[0]


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in build_parser()._actions for option in action.option_strings if option not in text] == []


def test_the_parser_is_there_under_its_old_name() -> None:
    assert cmd_args.parser is cmd_args.parser
    with pytest.raises(AttributeError):
        _ = cmd_args.no_such_name


def test_a_configuration_for_tests_has_all_flags(tmp_path: Path) -> None:
    config = config_for_tests(tmp_path, port=5, sdxl=True)
    assert (config.data_dir, config.port, config.sdxl) == (tmp_path, 5, True)
    assert (config.flags["port"], config.flags["sdxl"], config.flags["listen"]) == (5, True, False)


def test_a_browser_is_opened_only_where_there_is_a_screen() -> None:
    assert config_of(DISPLAY=":0").has_screen
    assert cmd_args._has_screen({}, "win32")
    assert not cmd_args._has_screen({}, "linux")
