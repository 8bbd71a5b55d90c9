@echo off
rem Starts the WebUI. webui-user.bat calls this after its settings.
cd /d "%~dp0"
if "%PYTHON%"=="" set PYTHON=python
%PYTHON% launch.py %*
if errorlevel 1 pause
