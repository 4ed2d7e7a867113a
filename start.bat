@echo off
rem Starts Turntable on Windows: makes .venv on the first start, installs requirements.txt, and runs app.py.
rem UNTESTED: nobody has run this on Windows yet; start.sh is the one that is tested. Please report what breaks.
rem   start.bat --port 7861        arguments are handed to app.py; --help lists them
setlocal
set "HERE=%~dp0"
set "VENV=%HERE%.venv"
set "PYTHON=%VENV%\Scripts\python.exe"

if not exist "%PYTHON%" (
    py -3 -c "import sys; sys.exit(sys.version_info < (3, 10))" >nul 2>&1
    if errorlevel 1 (
        echo Missing Python 3.10 or newer: winget install Python.Python.3.13 1>&2
        exit /b 1
    )
    py -3 -m venv "%VENV%"
    if errorlevel 1 exit /b 1
)

rem .installed is a copy of the requirements that .venv was filled with.
fc /b "%HERE%requirements.txt" "%VENV%\.installed" >nul 2>&1
if errorlevel 1 (
    echo Installing requirements.txt into .venv, which takes a few minutes the first time. 1>&2
    "%PYTHON%" -m pip install --disable-pip-version-check --quiet -r "%HERE%requirements.txt" 1>&2
    if errorlevel 1 (
        echo Could not install requirements.txt; the lines above say why. 1>&2
        exit /b 1
    )
    copy /y "%HERE%requirements.txt" "%VENV%\.installed" >nul
)

"%PYTHON%" "%HERE%app.py" %*
exit /b %errorlevel%
