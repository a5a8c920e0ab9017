//! What LMDeploy's TurboMind takes: ids, each image's rows, and where among the ids they stand.
//!
//! ```text
//!   input_ids                 [1, 92543, …, 0, 0, … 0, 1, 328, …]          list of L ints
//!   input_embeddings          [tensor [P, H], …]                           one for each image, torch.float16
//!   input_embedding_ranges    [[140, 1365], …]                             begin and end of each, in positions
//! ```
//!
//! As a file ([`torch_save`](super::torch_save)) it is read back into the call itself:
//!
//! ```python
//! arguments = torch.load("sequence.pt", weights_only=True)
//! async for output in instance.async_stream_infer(session_id, **arguments, gen_config=...):
//! ```
//!
//! TurboMind casts the rows to its own dtype. The ids of image rows are looked up and then overwritten, so that any id of the
//! vocabulary will do; LMDeploy has the model's image token there, in earlier versions 0. InternLM-XComposer2-VL is served by
//! LMDeploy up to 0.14.
//!
//! # Source
//! LMDeploy 0.18, read, not copied: `lmdeploy/turbomind/turbomind.py` (`prepare_inputs`, `prepare_embeddings`),
//! `lmdeploy/vl/model/base.py` (`to_turbomind_aux`).

use super::Rows;
use super::torch_save::Value;
use crate::error::Result;
use crate::prompt::SequencePlan;

/// The id in image rows, where no other is asked for.
pub const IMAGE_TOKEN: u32 = 0;

/// Returns the arguments of `async_stream_infer` for a sequence `[L, H]`, as a dictionary; the rows stay where they lie.
/// An image that a cut lost is left out; without images, both arguments of them are `None`.
///
/// # Errors
/// [`crate::Error::Argument`] if rows and plan do not have the same length.
pub fn arguments<'a>(plan: &SequencePlan, sequence: Rows<'a>, image_token: u32) -> Result<Value<'a>> {
    let rows = sequence.of_slots(plan)?;
    let there = || plan.slots.iter().zip(&rows).filter(|(slot, _)| slot.len > 0);
    let embeddings = there().map(|(_, &rows)| rows.into()).collect::<Vec<_>>();
    let ranges =
        there().map(|(slot, _)| Value::ints([slot.offset, slot.offset + slot.len].map(|at| at as i64)));
    let images = |values: Vec<Value<'a>>| if values.is_empty() { Value::None } else { Value::List(values) };
    Ok(Value::Dict(vec![
        ("input_ids", Value::ints(plan.ids_with(image_token))),
        ("input_embedding_ranges", images(ranges.collect())),
        ("input_embeddings", images(embeddings)),
    ]))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::output::testkit::plan;

    #[test]
    fn images_stand_where_their_slots_are() {
        let values = [f16::ONE; 15];
        let plan = plan(); // its second image was cut off
        let arguments = arguments(&plan, Rows::new(&values, 3).unwrap(), 7).unwrap();
        let text = format!("{arguments:?}");
        let expected = r#"Dict([("input_ids", List([Int(1), Int(7), Int(7), Int(7), Int(9)])), ("input_embedding_ranges", List([List([Int(2), Int(4)])])), ("input_embeddings", List([Tensor("#;
        assert!(text.starts_with(expected), "{text}");
        assert!(super::arguments(&plan, Rows::new(&values[..12], 3).unwrap(), 7).is_err());
    }
}
