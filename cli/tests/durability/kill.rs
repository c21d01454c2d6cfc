//! The process is killed with -9 at random moments, hundreds of times.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_fault_disk::Dice;

use crate::file::File;
use crate::process::{Dev, end, sound};
use crate::verify::{verify, verify_gone};
use crate::web::Web;
use crate::work::{World, work};

/// Files that are worked on at once.
const FILES: usize = 6;

/// Files that have ended and are looked at again.
const REMEMBERED: usize = 24;

#[test]
fn what_was_acknowledged_survives_hundreds_of_kills() {
    let kills: u64 = std::env::var("SLUICE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let mut dice = Dice(crate::seed("kills"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let world = Arc::new(World::default());
    let mut gone: Vec<File> = Vec::new();

    for life in 0..kills {
        // Some die before they serve anyone.
        if dice.one_in(10) {
            let mut child = Dev::spawn(home.path(), &data);
            std::thread::sleep(Duration::from_micros(dice.below(150_000)));
            end(&mut child);
            continue;
        }
        let dev = Dev::start(home.path(), &data).unwrap_or_else(|error| panic!("life {life}: {error}"));
        let web = Web::new(&data, &dev.urls);
        runtime
            .block_on(check(&world, &gone, &web, &mut dice))
            .unwrap_or_else(|wrong| panic!("life {life}: {wrong}"));
        renew(&world, &mut gone, &mut dice, FILES);
        world.ask_again();
        let answers = 1 + dice.below(30);
        let workers = runtime.block_on(async {
            let workers = work(&world, &web, &mut dice, answers).await;
            // Not always in the moment after an answer.
            tokio::time::sleep(Duration::from_micros(dice.below(4_000))).await;
            workers
        });
        dev.kill();
        runtime.block_on(workers.end());
        // What lies there between two lives is sound by itself.
        if dice.one_in(8) {
            sound(home.path(), &data).unwrap_or_else(|found| panic!("life {life}: {found}"));
        }
        if let Some(wrong) = world.wrong.lock().unwrap().take() {
            panic!("life {life}: {wrong}");
        }
    }

    // One more life, to its end: everything is finished, read and ended.
    let dev = Dev::start(home.path(), &data).unwrap();
    let web = Web::new(&data, &dev.urls);
    runtime
        .block_on(check(&world, &gone, &web, &mut dice))
        .unwrap_or_else(|wrong| panic!("at the end: {wrong}"));
    world.ask_again();
    runtime.block_on(async { work(&world, &web, &mut dice, u64::MAX).await.end().await });
    if let Some(wrong) = world.wrong.lock().unwrap().take() {
        panic!("at the end: {wrong}");
    }
    renew(&world, &mut gone, &mut dice, 0);
    for file in &gone {
        runtime.block_on(verify_gone(&web, file)).unwrap();
    }
    assert_eq!(dev.stop(), Some(0), "in order");
    sound(home.path(), &data).unwrap();
    let counts = world.counts();
    println!("{kills} kills: {counts:?}");
    assert!(world.files.lock().unwrap().is_empty());
    assert!(counts.unanswered > 0 && counts.assembled > 0 && counts.provisional_chunks > 0, "{counts:?}");
}

/// Checks every file against what is known of it.
async fn check(world: &World, gone: &[File], web: &Web, dice: &mut Dice) -> Result<(), String> {
    let files = std::mem::take(&mut *world.files.lock().unwrap());
    let looks = files.iter().map(|file| (file, dice.one_in(2))).collect::<Vec<_>>();
    let checked = stream::iter(looks).map(|(file, read)| verify(web, file, read)).buffer_unordered(4);
    let checked = checked.try_collect::<()>().await;
    let some: Vec<&File> = gone.iter().filter(|_| dice.one_in(4)).collect();
    let result = match checked {
        Ok(()) => {
            stream::iter(some).map(|file| verify(web, file, false)).buffer_unordered(4).try_collect().await
        }
        failed => failed,
    };
    *world.files.lock().unwrap() = files;
    result
}

/// Puts new files in the place of those with which nothing is left to do.
fn renew(world: &World, gone: &mut Vec<File>, dice: &mut Dice, files: usize) {
    let mut all = world.files.lock().unwrap();
    let (done, mut left): (Vec<File>, Vec<File>) = all.drain(..).partition(File::is_done);
    gone.extend(done);
    let forgotten = gone.len().saturating_sub(REMEMBERED);
    gone.drain(..forgotten);
    while left.len() < files {
        left.push(File::new(dice));
    }
    *all = left;
}
