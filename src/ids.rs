//! Names that were validated once and carry that proof in their type.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {text:?} is refused: {rule}")]
pub struct NameError {
    kind: &'static str,
    text: String,
    rule: &'static str,
}

impl NameError {
    fn new(kind: &'static str, text: &str, rule: &'static str) -> Self {
        let text = text.chars().take(64).collect();
        Self { kind, text, rule }
    }
}

/// Lower-case letters, digits and dashes, as both file name and log word.
fn check_label(kind: &'static str, text: &str) -> Result<(), NameError> {
    let rule = if text.is_empty() || text.len() > 64 {
        "it must have 1 to 64 characters"
    } else if !text
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
    {
        "only a-z, 0-9, - and _ are allowed"
    } else if text.starts_with(['-', '_']) {
        "it must begin with a letter or digit"
    } else {
        return Ok(());
    };
    Err(NameError::new(kind, text, rule))
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(String);

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl $name {
            /// Checks and wraps a name: 1 to 64 of `a-z 0-9 - _`, first a letter or digit.
            ///
            /// # Errors
            /// [`NameError`] with the rule that was broken.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                check_label($kind, &text)?;
                Ok(Self(text))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }
    };
}

label! {
    /// The identity of one sandbox, for as long as it exists, paused or running.
    SandboxId, "sandbox id"
}
label! {
    /// The name of a snapshot template.
    TemplateId, "template id"
}

impl SandboxId {
    /// A fresh, random id: `sb-` and 16 hexadecimal digits.
    #[must_use]
    pub fn random() -> Self {
        Self::random_with("sb-")
    }

    /// Another beginning; the caller knows that it may be one.
    pub(crate) fn random_with(prefix: &'static str) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        Self(format!("{prefix}{}", &random[..16]))
    }
}

/// The name of a network interface: 1 to 15 bytes, no slash, colon or white space, not `.`
/// or `..` (`dev_valid_name` in the kernel's net/core/dev.c), and here ASCII only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    /// Checks and wraps an interface name.
    ///
    /// # Errors
    /// [`NameError`] with the rule that was broken.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let rule = if text.is_empty() || text.len() > 15 {
            "it must have 1 to 15 bytes"
        } else if text == "." || text == ".." {
            "the kernel reserves . and .."
        } else if !text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
        {
            "only printable ASCII without / : % is allowed"
        } else {
            return Ok(Self(text));
        };
        Err(NameError::new("interface name", &text, rule))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for IfName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

/// The index of a network slot, 1 to 32767.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u16", try_from = "u16")]
pub struct SlotIndex(u16);

impl From<SlotIndex> for u16 {
    fn from(index: SlotIndex) -> Self {
        index.0
    }
}

impl TryFrom<u16> for SlotIndex {
    type Error = NameError;
    fn try_from(index: u16) -> Result<Self, NameError> {
        Self::new(index)
    }
}

impl SlotIndex {
    /// The highest index.
    pub const MAX: u16 = 32767;

    /// Checks and wraps an index.
    ///
    /// # Errors
    /// [`NameError`] outside 1 to 32767.
    pub fn new(index: u16) -> Result<Self, NameError> {
        if (1..=Self::MAX).contains(&index) {
            Ok(Self(index))
        } else {
            Err(NameError::new(
                "slot index",
                &index.to_string(),
                "it must be 1 to 32767",
            ))
        }
    }

    /// The index as a number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for SlotIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_refuse_what_a_path_or_log_would_trip_over() {
        for bad in [
            "",
            "A",
            "a/b",
            "..",
            "-a",
            "_a",
            "a b",
            "ä",
            &"a".repeat(65),
        ] {
            assert!(SandboxId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0", "python-3_12", &"a".repeat(64)] {
            assert!(TemplateId::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn random_ids_are_valid_and_differ() {
        let (a, b) = (SandboxId::random(), SandboxId::random());
        assert_ne!(a, b);
        assert_eq!(SandboxId::new(a.as_str()), Ok(a));
    }

    #[test]
    fn interface_names_follow_the_kernel() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx", "ä"] {
            assert!(IfName::new(bad).is_err(), "{bad:?}");
        }
        assert!(IfName::new("fifteen-bytes-x").is_ok());
    }

    #[test]
    fn slot_indices_stay_in_range() {
        assert!(SlotIndex::new(0).is_err());
        assert!(SlotIndex::new(32768).is_err());
        assert_eq!(SlotIndex::new(32767).unwrap().get(), 32767);
    }
}
