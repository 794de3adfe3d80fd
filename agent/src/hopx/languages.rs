//! The languages of `/execute`, as programs that take code on their standard input or as an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use super::error::HopxError;
use super::run::Program;
use crate::process::spawn::ProcessConfig;

/// The kernel's limit for one argument (MAX_ARG_STRLEN), with its end.
const ARGUMENT_BYTES_MAX: usize = (128 << 10) - 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Language {
    Python,
    JavaScript,
    Bash,
    Go,
}

impl Language {
    pub(super) fn named(name: Option<&str>) -> Result<Language, HopxError> {
        match name.unwrap_or("python").to_ascii_lowercase().as_str() {
            "python" | "python3" | "py" | "ipython" => Ok(Language::Python),
            "javascript" | "js" | "node" | "nodejs" => Ok(Language::JavaScript),
            "bash" | "sh" | "shell" => Ok(Language::Bash),
            "go" | "golang" => Ok(Language::Go),
            other => Err(HopxError::invalid(format!("language is '{other}'; it must be python, javascript, bash or go"))),
        }
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            Language::Python => "python",
            Language::JavaScript => "javascript",
            Language::Bash => "bash",
            Language::Go => "go",
        }
    }

    /// A process of its own that runs the code. Bash takes it as an argument, since on its standard input the commands
    /// in it would read it away.
    pub(super) fn program(
        self,
        code: String,
        workdir: String,
        envs: BTreeMap<String, String>,
        timeout: Duration,
    ) -> Result<Program, HopxError> {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let (cmd, args, input) = match self {
            Language::Python => ("python3", words(&["-u", "-"]), Some(code)),
            Language::JavaScript => ("node", words(&["-"]), Some(code)),
            Language::Bash if code.len() > ARGUMENT_BYTES_MAX => {
                return Err(HopxError::invalid(format!(
                    "code has {} bytes; the limit for bash is {ARGUMENT_BYTES_MAX}, write it to a file and run that",
                    code.len()
                )));
            }
            Language::Bash => ("bash", vec!["-c".to_owned(), code], None),
            // The compiler wants a file with a name of its own.
            Language::Go => {
                let compile = "folder=$(mktemp -d) && cat > $folder/main.go && go build -o $folder/main $folder/main.go && $folder/main; \
                               status=$?; rm -rf \"$folder\"; exit $status";
                ("bash", words(&["-c", compile]), Some(code))
            }
        };
        let config = ProcessConfig { cmd: cmd.to_owned(), args, envs, cwd: Some(workdir) };
        Ok(Program { config, input: input.map(String::into_bytes), timeout })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_clients_have_is_known() {
        for (name, language) in
            [("python3", Language::Python), ("nodejs", Language::JavaScript), ("shell", Language::Bash), ("go", Language::Go)]
        {
            assert_eq!(Language::named(Some(name)).unwrap(), language);
        }
        assert_eq!(Language::named(None).unwrap(), Language::Python);
        assert!(Language::named(Some("cobol")).is_err());
    }
}
