use super::*;

mod emulated;

#[test]
fn groups_are_as_large_as_can_be_and_alike() {
    for (images, devices, most, sizes) in [
        (0, 2, 12, vec![]),
        (1, 2, 12, vec![1]),
        (2, 2, 12, vec![1, 1]),
        (5, 2, 12, vec![3, 2]),
        (14, 2, 12, vec![7, 7]),
        (30, 2, 12, vec![8, 8, 7, 7]),
        (3, 4, 12, vec![1, 1, 1]),
        (9, 4, 2, vec![2, 1, 1, 1, 1, 1, 1, 1]),
        (3, 2, 1, vec![1, 1, 1]),
        (12, 1, 12, vec![12]),
        (13, 1, 12, vec![7, 6]),
        (25, 1, 12, vec![9, 8, 8]),
    ] {
        assert_eq!(group_sizes(images, devices, most), sizes, "{images} on {devices}");
    }
    for images in 0..100 {
        for devices in 1..9 {
            for most in [1, 2, 8, 12] {
                let sizes = group_sizes(images, devices, most);
                assert_eq!(sizes.iter().sum::<usize>(), images);
                assert!(sizes.iter().all(|size| (1..=most).contains(size)));
                let of = |device| sizes.iter().skip(device).step_by(devices).sum::<usize>();
                let loads: Vec<usize> = (0..devices).map(of).collect();
                let (least, largest) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
                assert!(largest - least <= 1, "{images} images, groups of {most}: {loads:?}");
            }
        }
    }
}
