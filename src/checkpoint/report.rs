//! What fp16 does to a checkpoint's values, by group of tensors.

use std::fmt;

use serde::Serialize;

use super::convert::{RangePolicy, ValueStats};
use super::dtype::DType;
use crate::warning::{Warning, WarningKind};

/// Share of a group's values, in percent, above which their becoming subnormal deserves a warning. Of weights
/// as they are trained, about a quarter of a percent lies below 2⁻¹⁴, and nobody could tell.
const SUBNORMAL_PERCENT: u64 = 10;
/// The same for values that became zero.
const ZEROED_PERCENT: u64 = 1;

/// Tensors that differ only in the number of their block, and what their values look like in fp16.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GroupStats {
    /// Their name, with `*` for the number: `model.layers.*.attention.wo.weight`.
    pub name: String,
    /// How many they are.
    pub tensors: usize,
    /// Their dtypes as stored.
    pub dtypes: Vec<DType>,
    /// The tensor with the largest magnitude.
    pub largest_in: String,
    /// Counts over all of them.
    #[serde(flatten)]
    pub stats: ValueStats,
}

/// What converting weights did to their values. [`fmt::Display`] gives the table of groups.
///
/// A GPU that converts looks for what does not fit alone: where it cut nothing, neither what became subnormal or
/// zero nor the largest magnitude is counted. [`Checkpoint::inspect`](super::Checkpoint::inspect) has all of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConversionReport {
    /// By group of tensors, in the order of [`VisionWeights`](super::weights::VisionWeights).
    pub groups: Vec<GroupStats>,
}

impl ConversionReport {
    /// Returns the counts over all groups.
    pub fn total(&self) -> ValueStats {
        let mut total = ValueStats::default();
        self.groups.iter().for_each(|group| total.merge(&group.stats));
        total
    }

    /// Returns the values that were cut to ±65504. With [`RangePolicy::Refuse`] there are none.
    pub fn saturated(&self) -> u64 {
        self.total().out_of_range
    }

    /// Says what deserves a word: any value cut to ±65504, more than 1 % of a group's values that became
    /// zero, more than 10 % that became subnormal.
    pub fn warnings(&self) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let mut warn = |message| warnings.push(Warning::new(WarningKind::Checkpoint, message));
        for GroupStats { name, stats, largest_in, .. } in &self.groups {
            let more_than = |count: u64, percent: u64| count * 100 > stats.elements * percent;
            if stats.out_of_range > 0 {
                let largest = stats.largest;
                warn(format!(
                    "{} of {} values of `{name}` were cut to ±65504 (the largest is {largest}, in `{largest_in}`)",
                    stats.out_of_range, stats.elements
                ));
            }
            if more_than(stats.zeroed, ZEROED_PERCENT) {
                warn(format!(
                    "{} of {} values of `{name}` became zero in fp16; `imagehere inspect` shows all groups",
                    stats.zeroed, stats.elements
                ));
            }
            if more_than(stats.subnormal, SUBNORMAL_PERCENT) {
                warn(format!(
                    "{} of {} values of `{name}` became subnormal in fp16, with fewer digits; \
                     `imagehere inspect` shows all groups",
                    stats.subnormal, stats.elements
                ));
            }
        }
        warnings
    }
}

/// Collects statistics of tensors into groups, in the order in which the groups first appear.
#[derive(Default)]
pub(crate) struct Groups(Vec<GroupStats>);

impl Groups {
    /// Adds a tensor's.
    pub fn add(&mut self, name: &str, dtype: DType, stats: &ValueStats) {
        let group_name = group_of(name);
        // From behind: neighbours are mostly of the same block, a few names back at most.
        let at = self.0.iter().rposition(|group| group.name == group_name).unwrap_or_else(|| {
            self.0.push(GroupStats {
                name: group_name,
                tensors: 0,
                dtypes: Vec::new(),
                largest_in: name.to_owned(),
                stats: ValueStats::default(),
            });
            self.0.len() - 1
        });
        let group = &mut self.0[at];
        group.tensors += 1;
        if !group.dtypes.contains(&dtype) {
            group.dtypes.push(dtype);
        }
        if stats.largest > group.stats.largest {
            group.largest_in = name.to_owned();
        }
        group.stats.merge(stats);
    }

    pub fn into_vec(self) -> Vec<GroupStats> {
        self.0
    }
}

/// A tensor's name with `*` for the number of its block: `model.layers.*.attention.wo.weight`.
fn group_of(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    for i in 1..parts.len() {
        if parts[i - 1] == "layers" && parts[i].bytes().all(|byte| byte.is_ascii_digit()) {
            parts[i] = "*";
        }
    }
    parts.join(".")
}

/// Writes groups as the table that a user reads.
pub(crate) fn table(groups: &[GroupStats], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let width = groups.iter().map(|group| group.name.len()).max().unwrap_or(0).max(5);
    writeln!(
        f,
        "{:width$}  {:>7}  {:>13}  {:>8}  {:>11}  {:>11}  {:>9}  {:>9}",
        "group", "tensors", "values", "dtype", "largest", "subnormal", "zeroed", "too large"
    )?;
    for GroupStats { name, tensors, dtypes, stats, .. } in groups {
        let dtypes: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
        let beyond = match stats.nan {
            0 => stats.out_of_range.to_string(),
            nan => format!("{}+{nan}NaN", stats.out_of_range),
        };
        writeln!(
            f,
            "{name:width$}  {tensors:>7}  {:>13}  {:>8}  {:>11.4e}  {:>11}  {:>9}  {beyond:>9}",
            stats.elements,
            dtypes.join(","),
            stats.largest,
            stats.subnormal,
            stats.zeroed,
        )?;
    }
    Ok(())
}

impl fmt::Display for ConversionReport {
    /// The table of groups.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table(&self.groups, f)
    }
}

/// Makes the report of a conversion, after its policy had its say.
pub(crate) fn conversion_report(groups: Groups, policy: RangePolicy) -> ConversionReport {
    let report = ConversionReport { groups: groups.into_vec() };
    tracing::debug!(?policy, total = ?report.total(), "weights converted to fp16");
    report
}
