//! JSON from outside, with bounds on its size and depth checked before anything is built.

use std::fmt;

use serde::de::DeserializeOwned;

use super::excerpt::excerpt;

/// How large and how deep a document may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JsonLimits {
    /// Length of the whole text.
    pub bytes: usize,
    /// Arrays and objects inside one another; `[]` has depth 1.
    pub depth: usize,
}

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Longer than [`JsonLimits::bytes`].
    #[error("JSON of {bytes} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Deeper than [`JsonLimits::depth`].
    #[error("JSON nests deeper than {limit} at byte {offset}")]
    TooDeep {
        /// Where the limit was passed.
        offset: usize,
        /// The limit.
        limit: usize,
    },
    /// Not JSON, or not of the expected shape.
    #[error("Cannot read JSON")]
    Malformed(#[source] JsonFault),
}

/// What the JSON parser objects to. It may quote the document, so its text is kept only
/// escaped and cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonFault {
    message: String,
    category: JsonCategory,
}

/// The two ways in which a document of permitted size can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JsonCategory {
    /// It is not JSON, or ends too early.
    Syntax,
    /// It is JSON of another shape than expected.
    Shape,
}

impl JsonFault {
    pub(crate) fn new(error: &serde_json::Error) -> Self {
        let category = match error.classify() {
            serde_json::error::Category::Data => JsonCategory::Shape,
            _ => JsonCategory::Syntax,
        };
        Self {
            message: excerpt(error.to_string()),
            category,
        }
    }

    /// Whether it is JSON at all.
    #[must_use]
    pub const fn category(&self) -> JsonCategory {
        self.category
    }
}

impl fmt::Display for JsonFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JsonFault {}

/// Keys that a type does not know, each with its path: `disks.0.colour`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnknownKeys {
    paths: Vec<String>,
    more: usize,
}

impl UnknownKeys {
    /// Paths that are kept; of the others only the number.
    pub const KEPT: usize = 32;

    /// Whether every key was known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The first [`UnknownKeys::KEPT`] paths, escaped and cut.
    #[must_use]
    pub fn paths(&self) -> &[String] {
        &self.paths
    }

    fn note(&mut self, path: &serde_ignored::Path<'_>) {
        if self.paths.len() < Self::KEPT {
            let mut text = String::new();
            write_path(path, &mut text);
            self.paths.push(excerpt(text));
        } else {
            self.more += 1;
        }
    }
}

impl fmt::Display for UnknownKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.paths.join(", "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// `serde_ignored` marks options and newtypes in its paths; JSON does not.
fn write_path(path: &serde_ignored::Path<'_>, out: &mut String) {
    use serde_ignored::Path;
    let (parent, segment) = match path {
        Path::Root => return,
        Path::Seq { parent, index } => (parent, index.to_string()),
        Path::Map { parent, key } => (parent, key.clone()),
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => return write_path(parent, out),
    };
    write_path(parent, out);
    if !out.is_empty() {
        out.push('.');
    }
    out.push_str(&segment);
}

/// Reads one document within bounds. Keys that `T` does not know are skipped.
///
/// # Errors
/// [`JsonError`]; trailing text other than white space is [`JsonError::Malformed`].
pub fn from_slice_bounded<T: DeserializeOwned>(
    bytes: &[u8],
    limits: JsonLimits,
) -> Result<T, JsonError> {
    check(bytes, limits)?;
    serde_json::from_slice(bytes).map_err(|error| JsonError::Malformed(JsonFault::new(&error)))
}

/// [`from_slice_bounded`] that also names every key `T` does not know. Keys next to a
/// `#[serde(flatten)]` go unnoticed: types for this function must not flatten.
///
/// # Errors
/// As [`from_slice_bounded`].
pub fn from_slice_noting_unknown<T: DeserializeOwned>(
    bytes: &[u8],
    limits: JsonLimits,
) -> Result<(T, UnknownKeys), JsonError> {
    check(bytes, limits)?;
    let mut unknown = UnknownKeys::default();
    let mut document = serde_json::Deserializer::from_slice(bytes);
    let value = serde_ignored::deserialize(&mut document, |path| unknown.note(&path))
        .and_then(|value| document.end().map(|()| value))
        .map_err(|error| JsonError::Malformed(JsonFault::new(&error)))?;
    Ok((value, unknown))
}

/// Checks size and nesting without building anything. Text that is not JSON may pass: the
/// parser after it is the judge of that.
///
/// # Errors
/// [`JsonError::TooLarge`] and [`JsonError::TooDeep`].
pub fn check(bytes: &[u8], limits: JsonLimits) -> Result<(), JsonError> {
    if bytes.len() > limits.bytes {
        return Err(JsonError::TooLarge {
            bytes: bytes.len(),
            limit: limits.bytes,
        });
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (offset, byte) in bytes.iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > limits.depth {
                    return Err(JsonError::TooDeep {
                        offset,
                        limit: limits.depth,
                    });
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeMap;

    use serde::Deserialize;

    const LIMITS: JsonLimits = JsonLimits {
        bytes: 64,
        depth: 3,
    };

    #[test]
    fn depth_counts_only_what_nests() {
        for (text, fits) in [
            ("[[[1]]]", true),
            ("[[[[1]]]]", false),
            (r#"[[{"a":1},{"b":2}],[[]]]"#, true),
            (r#"{"a":{"b":{"c":{}}}}"#, false),
            (r#"["[[[[[[["]"#, true),
            (r#"["\"[[[[[[["]"#, true),
            (r#"["\\",[[[]]]]"#, false),
        ] {
            let read = from_slice_bounded::<serde_json::Value>(text.as_bytes(), LIMITS);
            assert_eq!(read.is_ok(), fits, "{text}: {read:?}");
            if !fits {
                assert!(matches!(read, Err(JsonError::TooDeep { limit: 3, .. })));
            }
        }
    }

    #[test]
    fn a_document_of_any_depth_is_refused_without_recursion() {
        let deep = "[".repeat(1 << 20);
        let limits = JsonLimits {
            bytes: 2 << 20,
            depth: 100,
        };
        assert_eq!(
            from_slice_bounded::<serde_json::Value>(deep.as_bytes(), limits),
            Err(JsonError::TooDeep {
                offset: 100,
                limit: 100
            })
        );
    }

    #[test]
    fn refuses_long_documents_and_trailing_text() {
        let long = format!("\"{}\"", "a".repeat(63));
        assert_eq!(
            from_slice_bounded::<String>(long.as_bytes(), LIMITS),
            Err(JsonError::TooLarge {
                bytes: 65,
                limit: 64
            })
        );
        for trailing in ["1 2", "1}", "1 x"] {
            assert!(from_slice_bounded::<u8>(trailing.as_bytes(), LIMITS).is_err());
            assert!(from_slice_noting_unknown::<u8>(trailing.as_bytes(), LIMITS).is_err());
        }
        assert_eq!(from_slice_bounded::<u8>(b" 1 \n", LIMITS), Ok(1));
    }

    #[test]
    fn faults_say_what_kind_they_are_and_quote_safely() {
        #[derive(Debug, Deserialize)]
        enum Mode {
            Off,
        }
        let syntax = from_slice_bounded::<Mode>(b"{oops", LIMITS).unwrap_err();
        let JsonError::Malformed(fault) = syntax else {
            panic!("{syntax:?}");
        };
        assert_eq!(fault.category(), JsonCategory::Syntax);

        let Err(JsonError::Malformed(fault)) =
            from_slice_bounded::<Mode>(b"\"\\u001b[2J\"", LIMITS)
        else {
            panic!("an unknown variant was accepted");
        };
        assert_eq!(fault.category(), JsonCategory::Shape);
        assert!(!fault.to_string().contains('\x1b'), "{fault}");
        assert!(fault.to_string().contains("\\u{1b}[2J"), "{fault}");
        assert!(from_slice_bounded::<Mode>(b"\"Off\"", LIMITS).is_ok());
    }

    #[test]
    fn unknown_keys_are_named_by_their_path() {
        #[derive(Debug, Deserialize)]
        #[expect(dead_code, reason = "only its shape matters")]
        struct Inner {
            known: Option<u8>,
        }
        #[derive(Debug, Deserialize)]
        #[expect(dead_code, reason = "only its shape matters")]
        struct Outer {
            list: Option<Vec<Inner>>,
            map: Option<BTreeMap<String, Inner>>,
        }
        let limits = JsonLimits {
            bytes: 4096,
            depth: 8,
        };
        let text = br#"{"list":[{"known":1},{"a\n":null}],"map":{"x":{"y":{"z":1}}},"top":[1]}"#;
        let (_, unknown) = from_slice_noting_unknown::<Outer>(text, limits).unwrap();
        assert_eq!(unknown.paths(), ["list.1.a\\n", "map.x.y", "top"]);
        assert_eq!(unknown.to_string(), "list.1.a\\n, map.x.y, top");

        let many: Vec<String> = (0..40).map(|i| format!("\"k{i}\":0")).collect();
        let text = format!("{{{}}}", many.join(","));
        let (_, unknown) = from_slice_noting_unknown::<Outer>(text.as_bytes(), limits).unwrap();
        assert_eq!(unknown.paths().len(), UnknownKeys::KEPT);
        assert!(unknown.to_string().ends_with(" and 8 more"), "{unknown}");
    }
}
