//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An Ethernet address, as text six pairs of hexadecimal digits between colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// The text is no Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("An Ethernet address is six pairs of hexadecimal digits between colons")]
pub struct MacAddrError;

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, MacAddrError> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or(MacAddrError)?;
            // `from_str_radix` alone would take a sign or a single digit.
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(MacAddrError);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| MacAddrError)?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(MacAddrError),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacAddr({self})")
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_as_they_were_read() {
        let text = "02:fc:00:00:00:05";
        let mac: MacAddr = text.parse().unwrap();
        assert_eq!(mac, MacAddr([2, 0xfc, 0, 0, 0, 5]));
        assert_eq!(mac.to_string(), text);
        assert_eq!("02:FC:00:00:00:05".parse(), Ok(mac));
        assert_eq!(serde_json::to_string(&mac).unwrap(), format!("\"{text}\""));
        assert_eq!(
            serde_json::from_str::<MacAddr>(&format!("\"{text}\"")).unwrap(),
            mac
        );
    }

    #[test]
    fn refuses_what_is_no_address() {
        for bad in [
            "",
            "02:fc:00:00:00",
            "02:fc:00:00:00:05:06",
            "2:fc:00:00:00:05",
            "+2:fc:00:00:00:05",
            "02-fc-00-00-00-05",
            "02:fc:00:00:00:0g",
            "02:fc:00:00:00:005",
        ] {
            assert_eq!(bad.parse::<MacAddr>(), Err(MacAddrError), "{bad:?}");
        }
    }
}
