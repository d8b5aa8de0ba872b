//! Bandwidth of a pod: from the configuration, or from the annotations that Kubernetes has for it.

use std::collections::HashMap;

use super::error::NetworkError;
use crate::hypervisor::NetworkLimits;

/// What a pod may receive, in bits a second.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// What a pod may send, in bits a second.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// What Kubernetes allows: 1k to 1P.
const RANGE: std::ops::RangeInclusive<u64> = 1000..=1_000_000_000_000_000;

/// The limits that `annotations` ask for, instead of those in force: `ceiling`, the node's, can only be lowered. An annotation
/// that is missing changes nothing.
///
/// # Errors
/// [`NetworkError::Bandwidth`] for an annotation that is no bandwidth.
pub fn limits(
    in_force: NetworkLimits,
    ceiling: NetworkLimits,
    annotations: &HashMap<String, String>,
) -> Result<NetworkLimits, NetworkError> {
    let of = |in_force, ceiling, annotation| -> Result<u64, NetworkError> {
        let asked = bandwidth(annotation, annotations)?;
        Ok(asked.map_or(in_force, |asked| lower(ceiling, asked)))
    };
    Ok(NetworkLimits {
        rx: of(in_force.rx, ceiling.rx, INGRESS)?,
        tx: of(in_force.tx, ceiling.tx, EGRESS)?,
    })
}

/// The lower of two limits, where a ceiling of 0 is none.
fn lower(ceiling: u64, asked: u64) -> u64 {
    match ceiling {
        0 => asked,
        ceiling => ceiling.min(asked),
    }
}

fn bandwidth(
    annotation: &'static str,
    annotations: &HashMap<String, String>,
) -> Result<Option<u64>, NetworkError> {
    let Some(value) = annotations.get(annotation) else {
        return Ok(None);
    };
    let refuse = |need| NetworkError::Bandwidth {
        annotation,
        value: value.clone(),
        need,
    };
    let bits =
        quantity(value).ok_or_else(|| refuse("must be a quantity as Kubernetes writes it, like 10M"))?;
    match RANGE.contains(&bits) {
        true => Ok(Some(bits)),
        false => Err(refuse("must be 1k to 1P bits a second")),
    }
}

/// A quantity of Kubernetes (apimachinery, pkg/api/resource): a decimal number with a suffix or an exponent, rounded up to
/// a whole number. `None` for anything else.
fn quantity(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    // The number as an integer, and how often it is to be divided by ten.
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let places = i32::try_from(fraction.len()).ok()?;
    let (binary, decimal) = suffix_of(suffix)?;
    let scaled = digits
        .checked_shl(binary)
        .filter(|scaled| scaled >> binary == digits)?;
    let power = decimal - places;
    let ten = 10_u128.checked_pow(power.unsigned_abs())?;
    let value = if power >= 0 {
        scaled.checked_mul(ten)?
    } else {
        scaled.div_ceil(ten)
    };
    value.try_into().ok()
}

/// The powers of two and of ten that a suffix stands for.
fn suffix_of(suffix: &str) -> Option<(u32, i32)> {
    let binary = |power: u32| Some((10 * power, 0));
    let decimal = |power: i32| Some((0, power));
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let exponent: i32 = exponent.parse().ok()?;
            decimal(exponent).filter(|_| exponent.abs() <= 30)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ingress: &str) -> Result<u64, NetworkError> {
        let annotations = HashMap::from([(INGRESS.to_owned(), ingress.to_owned())]);
        let none = NetworkLimits::default();
        limits(none, none, &annotations).map(|limits| limits.rx)
    }

    #[test]
    fn quantity_when_kubernetes_writes_it_is_bits() {
        for (text, bits) in [
            ("10M", 10_000_000),
            ("1k", 1000),
            ("1Ki", 1024),
            ("1.5Gi", 3 << 29),
            ("2e3", 2000),
            ("5E6", 5_000_000),
            ("1000000m", 1000),
            ("1000.0001", 1001),
            (".5G", 500_000_000),
            ("1P", 1_000_000_000_000_000),
            ("1500", 1500),
        ] {
            assert_eq!(of(text).unwrap(), bits, "{text}");
        }
    }

    #[test]
    fn quantity_when_it_is_none_is_refused_by_name() {
        for text in [
            "",
            "M",
            "-1M",
            "+",
            "1.2.3k",
            "10MB",
            "ten",
            "1e",
            "1e99",
            "1e-99",
            "999",
            "2P",
            "99999999999999999999E",
        ] {
            let error = of(text).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(INGRESS) && message.contains(text), "{message}");
        }
    }

    #[test]
    fn limits_when_asked_for_by_a_pod_are_only_lowered() {
        let annotations = HashMap::from([
            (INGRESS.to_owned(), "10M".to_owned()),
            (EGRESS.to_owned(), "1G".to_owned()),
        ]);
        let node = NetworkLimits { rx: 0, tx: 1_000_000 };

        let limited = limits(node, node, &annotations).unwrap();

        let rx = 10_000_000;
        assert_eq!(limited, NetworkLimits { rx, tx: 1_000_000 });
        assert_eq!(limits(node, node, &HashMap::new()).unwrap(), node);
    }

    #[test]
    fn limits_when_asked_for_again_rise_up_to_the_nodes() {
        let node = NetworkLimits { rx: 0, tx: 1_000_000 };
        let in_force = NetworkLimits { rx: 2000, tx: 3000 };
        let asked = |annotation: &str| HashMap::from([(annotation.to_owned(), "2M".to_owned())]);

        let rx = limits(in_force, node, &asked(INGRESS)).unwrap();
        let tx = limits(in_force, node, &asked(EGRESS)).unwrap();

        assert_eq!((rx.rx, rx.tx), (2_000_000, 3000));
        assert_eq!((tx.rx, tx.tx), (2000, 1_000_000));
    }
}
