//! Which processor a template was frozen on, and whether another one can run it.
//!
//! A guest chooses its code by CPUID when it boots, and is never asked again. So what counts
//! is what the guest was shown: the table in `state.json` (`common_cpuid`), and not
//! `/proc/cpuinfo`, whose flags are the host kernel's opinion under names that change.
//! And what a host can offer is what KVM says it can (`KVM_GET_SUPPORTED_CPUID`), the very
//! call that CH makes.
//!
//! Kept are vendor, family, model and stepping, and the feature words themselves. A digest of
//! the whole table would be of no use: some of it differs from call to call (the APIC id of
//! whichever processor answered), some with the host's kernel, and a digest cannot tell that
//! another processor has *more*. With the words a refusal names what is missing.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::snapshot::CpuidEntry;

/// Most feature words that are read from a manifest.
const MAX_WORDS: usize = 64;

/// A processor, as a guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// The vendor text of CPUID: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// The family, with the extended family added.
    pub family: u32,
    /// The model, with the extended model before it.
    pub model: u32,
    /// The stepping.
    pub stepping: u32,
    /// What it can do; empty where that is not known.
    pub features: Vec<FeatureWord>,
}

/// One register of CPUID whose bits are features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureWord {
    /// The leaf.
    pub leaf: u32,
    /// The sub-leaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// Its bits.
    pub bits: u32,
}

/// A register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    const fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }
}

/// The registers that hold features, and the bits in them that say nothing of the processor:
/// what KVM or CH provide by themselves, and what mirrors a control register.
///
/// Leaf 1: x2APIC, TSC deadline, OSXSAVE and "under a hypervisor" in ECX; MTRR in EDX, which
/// CH sets. Leaf 7: OSPKE in ECX, TSC_ADJUST in EBX.
const WORDS: [(u32, u32, Register, u32); 10] = [
    (1, 0, Register::Ecx, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    (1, 0, Register::Edx, 1 << 12),
    (7, 0, Register::Ebx, 1 << 1),
    (7, 0, Register::Ecx, 1 << 4),
    (7, 0, Register::Edx, 0),
    (7, 1, Register::Eax, 0),
    (0xd, 1, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
];

/// Why a template's guest cannot run on a processor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OtherCpu {
    /// Another vendor's: other instructions, other errata.
    #[error("The template is of a processor by {template}, this machine has one by {host}")]
    Vendor {
        /// The template's.
        template: String,
        /// This machine's.
        host: String,
    },
    /// Another family, or, where features cannot be compared, another model.
    #[error("The template is of {template}, this machine has {host}")]
    Kind {
        /// The template's: `family 6 model 85`.
        template: String,
        /// This machine's.
        host: String,
    },
    /// The guest may use what this machine does not have.
    #[error("This processor lacks what the template's guest may use: CPUID {missing}")]
    Features {
        /// The missing bits: `leaf 7.0 EBX bits 16, 17`.
        missing: String,
    },
}

impl Cpu {
    /// Reads it out of a CPUID table; `None` where leaf 0 or 1 is not in it.
    #[must_use]
    pub fn of_table(table: &[CpuidEntry]) -> Option<Self> {
        let find = |leaf, index| {
            let mut entries = table.iter();
            entries.find(|entry| entry.function == leaf && entry.index == index)
        };
        let (zero, one) = (find(0, 0)?, find(1, 0)?);
        // CPUID spells the vendor in EBX, EDX, ECX.
        let vendor: Vec<u8> = [zero.ebx, zero.edx, zero.ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let words = WORDS
            .iter()
            .filter_map(|&(leaf, index, register, ignored)| {
                let bits = register.of(find(leaf, index)?) & !ignored;
                Some(FeatureWord {
                    leaf,
                    index,
                    register,
                    bits,
                })
            });
        let (family, model, stepping) = decode(one.eax);
        Some(Self {
            vendor: vendor.escape_ascii().to_string(),
            family,
            model,
            stepping,
            features: words.collect(),
        })
    }

    /// Reads vendor, family, model and stepping out of the text of `/proc/cpuinfo`; what the
    /// processor can do is not in there in a form that lasts.
    #[must_use]
    pub fn of_cpuinfo(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
        };
        let number = |name| field(name)?.parse().ok();
        Some(Self {
            vendor: field("vendor_id")?.escape_default().to_string(),
            family: number("cpu family")?,
            model: number("model")?,
            stepping: number("stepping")?,
            features: Vec::new(),
        })
    }

    /// Whether a guest that was shown this processor can go on running on `host`.
    ///
    /// Vendor and family must be the same, and every feature must be there. Another model is
    /// fine then, as it is to CH; where one side's features are not known, the model must be
    /// the same, too. The stepping does not matter.
    ///
    /// # Errors
    /// [`OtherCpu`]: what stands against it.
    pub fn can_run_on(&self, host: &Self) -> Result<(), OtherCpu> {
        if self.vendor != host.vendor {
            return Err(OtherCpu::Vendor {
                template: self.vendor.clone(),
                host: host.vendor.clone(),
            });
        }
        let comparable = !self.features.is_empty() && !host.features.is_empty();
        if self.family != host.family || (!comparable && self.model != host.model) {
            return Err(OtherCpu::Kind {
                template: self.kind(),
                host: host.kind(),
            });
        }
        if !comparable {
            return Ok(());
        }
        let lacking = self.features.iter().filter_map(|wanted| {
            let same = |word: &&FeatureWord| {
                (word.leaf, word.index, word.register)
                    == (wanted.leaf, wanted.index, wanted.register)
            };
            let there = host.features.iter().find(same).map_or(0, |word| word.bits);
            let bits = wanted.bits & !there;
            (bits != 0).then_some(FeatureWord { bits, ..*wanted })
        });
        let missing: Vec<String> = lacking.map(|word| word.to_string()).collect();
        if missing.is_empty() {
            Ok(())
        } else {
            let missing = missing.join("; ");
            Err(OtherCpu::Features { missing })
        }
    }

    /// Whether it is within the bounds of what is read from a manifest.
    pub(super) fn is_bounded(&self) -> bool {
        self.vendor.len() <= 64 && self.features.len() <= MAX_WORDS
    }

    fn kind(&self) -> String {
        format!("family {} model {}", self.family, self.model)
    }
}

impl fmt::Display for Cpu {
    /// `GenuineIntel family 6 model 85 stepping 7`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} stepping {}",
            self.vendor,
            self.kind(),
            self.stepping
        )
    }
}

impl fmt::Display for FeatureWord {
    /// `leaf 0x7.0 EBX bits 16, 17`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = self.register.name();
        write!(f, "leaf {:#x}.{} {register} bits", self.leaf, self.index)?;
        let bits = (0..32).filter(|bit| self.bits & 1 << bit != 0);
        for (count, bit) in bits.enumerate() {
            write!(f, "{}{bit}", if count == 0 { " " } else { ", " })?;
        }
        Ok(())
    }
}

/// Family, model and stepping of leaf 1's EAX (Intel SDM volume 2, CPUID).
const fn decode(signature: u32) -> (u32, u32, u32) {
    let base_family = signature >> 8 & 0xf;
    let extended = base_family == 0xf;
    let family = if extended {
        base_family + (signature >> 20 & 0xff)
    } else {
        base_family
    };
    let base_model = signature >> 4 & 0xf;
    let model = if extended || base_family == 6 {
        (signature >> 16 & 0xf) << 4 | base_model
    } else {
        base_model
    };
    (family, model, signature & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_read_as_the_manuals_say() {
        for (signature, expected) in [
            (0x000c_06f2, (6, 207, 2)),
            (0x0083_0f10, (0x17, 0x31, 0)),
            (0x00a1_0f11, (0x19, 0x11, 1)),
            (0x0000_0543, (5, 4, 3)),
        ] {
            assert_eq!(decode(signature), expected, "{signature:#x}");
        }
    }

    fn intel() -> Cpu {
        let word = |leaf, register, bits| FeatureWord {
            leaf,
            index: 0,
            register,
            bits,
        };
        Cpu {
            vendor: "GenuineIntel".to_owned(),
            family: 6,
            model: 85,
            stepping: 7,
            features: vec![
                word(1, Register::Ecx, 0b111),
                word(7, Register::Ebx, 1 << 16 | 1 << 17),
            ],
        }
    }

    #[test]
    fn a_processor_that_can_do_more_will_do_and_one_that_lacks_something_is_named() {
        let template = intel();
        let mut host = intel();
        host.model = 106;
        host.features[0].bits |= 1 << 20;
        template.can_run_on(&host).unwrap();
        host.features[1].bits = 1 << 16;
        let refused = template.can_run_on(&host).unwrap_err();
        assert!(
            refused.to_string().ends_with("leaf 0x7.0 EBX bits 17"),
            "{refused}"
        );
        host.features.remove(1);
        let refused = template.can_run_on(&host).unwrap_err();
        assert!(
            refused.to_string().ends_with("EBX bits 16, 17"),
            "{refused}"
        );

        let amd = Cpu {
            vendor: "AuthenticAMD".to_owned(),
            ..intel()
        };
        let refused = template.can_run_on(&amd).unwrap_err();
        assert!(matches!(refused, OtherCpu::Vendor { .. }), "{refused}");
    }

    #[test]
    fn where_features_are_unknown_the_model_must_be_the_same() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
                       model name\t: Intel(R) Xeon(R)\nstepping\t: 4\n";
        let host = Cpu::of_cpuinfo(cpuinfo).unwrap();
        intel().can_run_on(&host).unwrap();
        let other = Cpu { model: 86, ..host };
        let refused = intel().can_run_on(&other).unwrap_err();
        assert!(matches!(refused, OtherCpu::Kind { .. }), "{refused}");
    }
}
