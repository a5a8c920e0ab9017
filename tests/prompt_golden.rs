//! Plans with upstream's own tokenizer against upstream's own layout.

use std::ops::Range;

use imagehere::config::{ModelConfig, ModelSizes};
use imagehere::prompt::{Bos, MARKER, Meta, Planner, Request, SequencePlan};
use imagehere::tokenizer::Tokenizer;
use imagehere::{Error, WarningKind};

/// Rows of an image.
const I: usize = 1225;

/// Ids of the default system block and the opening of the user's turn, BOS first.
const DEFAULT_META_PREFIX: [i64; 137] = [
    1, 92543, 9081, 364, 2770, 657, 589, 15358, 17993, 6843, 963, 505, 4576, 11146, 30778, 1234, 20248, 451,
    62442, 60752, 60721, 61255, 61104, 4452, 285, 4576, 11146, 30778, 1234, 20248, 451, 62442, 60752, 60721,
    61255, 61104, 313, 505, 395, 7445, 17218, 2881, 7659, 1813, 4287, 1762, 560, 505, 8020, 684, 36956,
    15358, 31288, 451, 68589, 76659, 71581, 699, 1226, 505, 6342, 442, 517, 11100, 328, 10894, 328, 454,
    51978, 756, 285, 4576, 11146, 30778, 1234, 20248, 451, 62442, 60752, 60721, 61255, 61104, 313, 777, 3696,
    454, 19187, 19829, 4563, 435, 410, 4287, 12032, 684, 410, 1341, 1893, 569, 6519, 454, 262, 69093, 756,
    285, 4576, 11146, 30778, 1234, 20248, 451, 62442, 60752, 60721, 61255, 61104, 313, 505, 13026, 446,
    12824, 2613, 454, 27943, 15613, 14644, 13585, 3285, 519, 410, 4054, 2321, 281, 92542, 364, 92543, 1008,
    364,
];

const TWO: &str = "First picture:<ImageHere>, second picture:<ImageHere>. \
                   Describe the subject of these two pictures?";

fn planner() -> Planner {
    let sizes = ModelSizes {
        image_size: 490,
        patch_size: 14,
        width: 1024,
        layers: 24,
        mlp_width: 4096,
        projector_width: 4096,
        hidden_size: 4096,
        vocab_size: 92_544,
    };
    let mut config = ModelConfig::from_sizes(sizes).unwrap();
    config.max_length = Some(4096);
    config.max_position_embeddings = Some(32_768);
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");
    Planner::new(Tokenizer::from_dir(dir).unwrap(), config).unwrap()
}

/// The lengths of a plan's segments, in order.
fn layout(plan: &SequencePlan) -> Vec<usize> {
    plan.check().unwrap();
    plan.segments.iter().map(|segment| segment.len).collect()
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn layouts_are_upstreams() {
    let planner = planner();
    let three = format!("{} x", [MARKER; 3].join(" ")).replace("> x", ">x");
    for (query, meta, bos, want) in [
        ("<ImageHere>Please describe this image in detail.", true, Bos::PerSegment, &[137, I, 14][..]),
        ("<ImageHere>Please describe this image in detail.", true, Bos::First, &[137, I, 13]),
        (TWO, true, Bos::PerSegment, &[140, I, 5, I, 16]),
        (TWO, true, Bos::First, &[140, I, 4, I, 15]),
        (TWO, false, Bos::PerSegment, &[7, I, 5, I, 16]),
        (TWO, false, Bos::First, &[7, I, 4, I, 15]),
        (
            "<ImageHere> <ImageHere>Please describe these two images in detail.",
            true,
            Bos::PerSegment,
            &[137, I, 2, I, 15],
        ),
        ("<ImageHere><ImageHere>Compare.", true, Bos::PerSegment, &[137, I, I, 9]),
        (three.as_str(), true, Bos::PerSegment, &[137, I, 2, I, 2, I, 8]),
    ] {
        let request = Request::new(query)
            .image_count(query.matches(MARKER).count())
            .meta_instruction(if meta { Meta::Default } else { Meta::None })
            .bos(bos);
        let plan = planner.plan(&request).unwrap();
        assert_eq!(layout(&plan), want, "{query} {bos:?}");
        assert_eq!(plan.len(), want.iter().sum::<usize>());
        assert_eq!(plan.warnings, []);
        let prefix = if meta { &DEFAULT_META_PREFIX[..] } else { &[1, 92543, 1008, 364] };
        assert_eq!(plan.input_ids[..prefix.len()], *prefix);
    }
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn ids_of_the_two_image_prompt_are_upstreams() {
    let plan = planner().plan(&Request::new(TWO).images(["a.jpg", "b.jpg"])).unwrap();
    assert_eq!(plan.len(), 2611);
    let slots: Vec<Range<usize>> =
        plan.slots.iter().map(|slot| slot.offset..slot.offset + slot.len).collect();
    assert_eq!(slots, [140..1365, 1370..2595]);
    for (at, &mask) in plan.im_mask.iter().enumerate() {
        assert_eq!(mask, slots.iter().any(|slot| slot.contains(&at)), "{at}");
        assert_eq!(plan.input_ids[at] == -1, mask, "{at}");
    }
    assert_eq!(plan.input_ids[137..140], [5497, 6953, 334]);
    assert_eq!(plan.input_ids[1365..1370], [1, 328, 2238, 6953, 334]);
    assert_eq!(
        plan.input_ids[2595..],
        [1, 281, 59434, 410, 3988, 446, 1639, 1524, 9315, 345, 92542, 364, 92543, 525, 11353, 364]
    );
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn four_images_go_on_warn_or_are_cut() {
    let planner = planner();
    let query = format!("{}x", [MARKER; 4].join(" "));
    let names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"];
    let request = Request::new(&query).images(names);

    let plan = planner.plan(&request).unwrap();
    assert_eq!(layout(&plan), [137, I, 2, I, 2, I, 2, I, 8]);
    assert_eq!((plan.len(), plan.warnings[0].kind), (5051, WarningKind::BeyondMaxLength));

    let cut = planner.plan(&request.clone().truncate(true)).unwrap();
    assert_eq!(layout(&cut), [137, I, 2, I, 2, I, 2, 278]);
    assert_eq!(cut.input_ids, plan.input_ids[..4096]);
    assert_eq!(cut.warnings[0].kind, WarningKind::Truncated);
    let message = cut.warnings[0].to_string();
    assert!(message.contains("947 of the 1225 rows of image 4 (d.jpg), 8 text tokens"), "{message}");

    let Error::SequenceTooLong { length, sum, limit, .. } =
        planner.plan(&request.max_length(5050)).unwrap_err()
    else {
        panic!("5051 positions fit into 5050");
    };
    assert_eq!((length, limit), (5051, 5050));
    assert_eq!(
        sum,
        "137 text + 1225 image 1 + 2 text + 1225 image 2 + 2 text + 1225 image 3 + 2 text + 1225 image 4 + 8 text"
    );
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn text_alone_has_one_bos() {
    let plan = planner().plan(&Request::new("Hi").meta_instruction(Meta::None)).unwrap();
    assert_eq!(plan.input_ids[..4], [1, 92543, 1008, 364]);
    assert_eq!(plan.input_ids.iter().filter(|&&id| id == 1).count(), 1);
}
