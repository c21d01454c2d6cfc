//! Clients at work on several files at once, until they have had enough answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use reqwest::{Method, StatusCode};
use serde_json::json;
use sluice_fault_disk::Dice;
use sluice_proto::http::{ChunkReceipt, FileStatus, State};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::file::{Action, File, NAMES};
use crate::web::{Answer, Web};

/// Requests under way at once.
const WORKERS: usize = 4;

/// What all clients of a run share.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) files: Mutex<Vec<File>>,
    /// What must not be: the first that was seen.
    pub(crate) wrong: Mutex<Option<String>>,
    counts: Mutex<Counts>,
    changed: Notify,
    /// Workers that have ended, or wait for what others do. Once all do, nothing changes any more: a disk that is off cuts
    /// answers short, and whoever gets such a one ends, although the process lives.
    resting: AtomicUsize,
}

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) answers: u64,
    pub(crate) acknowledged_chunks: u64,
    pub(crate) provisional_chunks: u64,
    pub(crate) whole: u64,
    pub(crate) assembled: u64,
    pub(crate) read: u64,
    pub(crate) deleted: u64,
    pub(crate) unanswered: u64,
    pub(crate) later: u64,
}

impl World {
    pub(crate) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap()
    }

    pub(crate) fn blame(&self, wrong: String) {
        self.wrong.lock().unwrap().get_or_insert(wrong);
    }

    /// What the last life left without an answer is asked again, as a client would.
    pub(crate) fn ask_again(&self) {
        for file in self.files.lock().unwrap().iter_mut() {
            for action in std::mem::take(&mut file.begun).into_iter().rev() {
                file.todo.push_front(action);
            }
        }
    }

    /// Takes something to do of a random file; `None` if there is nothing now.
    fn next(&self, dice: &mut Dice) -> Option<(usize, Action)> {
        let mut files = self.files.lock().unwrap();
        let ready = |file: &File| {
            file.todo.front().is_some_and(|action| match action {
                // What nobody knows nobody can end.
                Action::Delete { early: true, .. } => !file.created.is_empty(),
                action => !action.waits() || file.begun.is_empty(),
            })
        };
        let ready: Vec<usize> = (0..files.len()).filter(|i| ready(&files[*i])).collect();
        if ready.is_empty() {
            return None;
        }
        let at = ready[dice.below(ready.len() as u64) as usize];
        let file = &mut files[at];
        let action = file.todo.pop_front().unwrap();
        file.begun.push(action);
        match action {
            Action::Put { start, count, .. } => file.sent.extend(start..start + count),
            Action::Whole { .. } => file.sent.extend(0..file.chunks()),
            Action::Delete { .. } => file.ending = true,
            Action::Create { .. } | Action::PutWrong { .. } | Action::Await { .. } | Action::Read { .. } => {}
        }
        Some((at, action))
    }

    fn is_idle(&self) -> bool {
        self.files.lock().unwrap().iter().all(File::is_done)
    }

    /// Notes that a worker has nothing to do; whether the others have nothing, either.
    fn rest(&self) -> bool {
        self.resting.fetch_add(1, Ordering::SeqCst) + 1 == WORKERS
    }

    fn all_rest(&self) -> bool {
        self.resting.load(Ordering::SeqCst) == WORKERS
    }
}

/// Works until `answers` came, something is wrong, all is done, or nobody can go on.
pub(crate) async fn work(world: &Arc<World>, web: &Web, dice: &mut Dice, answers: u64) -> Workers {
    let until = world.counts().answers.saturating_add(answers);
    world.resting.store(0, Ordering::SeqCst);
    let workers: Vec<_> = (0..WORKERS)
        .map(|_| tokio::spawn(worker(world.clone(), web.clone(), Dice(dice.roll()), until)))
        .collect();
    let done = async {
        loop {
            let changed = world.changed.notified();
            let enough = world.counts().answers >= until || world.is_idle();
            if enough || world.all_rest() || world.wrong.lock().unwrap().is_some() {
                return;
            }
            changed.await;
        }
    };
    done.await;
    Workers(workers)
}

/// Clients whose last requests are under way.
pub(crate) struct Workers(Vec<JoinHandle<()>>);

impl Workers {
    /// Waits until each has its answer, or knows that none comes: the process has ended, or all is done.
    pub(crate) async fn end(self) {
        for worker in self.0 {
            worker.await.unwrap();
        }
    }
}

async fn worker(world: Arc<World>, web: Web, dice: Dice, until: u64) {
    if !work_on(&world, &web, dice, until).await {
        world.rest();
    }
    world.changed.notify_waiters();
}

/// Works as long as it can; whether it rests already.
async fn work_on(world: &World, web: &Web, mut dice: Dice, until: u64) -> bool {
    while world.counts().answers < until && world.wrong.lock().unwrap().is_none() {
        let changed = world.changed.notified();
        let Some((at, action)) = world.next(&mut dice) else {
            if world.is_idle() {
                return false;
            }
            if world.rest() {
                return true;
            }
            changed.await;
            world.resting.fetch_sub(1, Ordering::SeqCst);
            continue;
        };
        let is_over = take(world, web, at, action).await;
        world.changed.notify_waiters();
        if is_over {
            return false;
        }
    }
    false
}

/// Does one thing, and notes what was answered; whether the process is gone.
async fn take(world: &World, web: &Web, at: usize, action: Action) -> bool {
    let answer = send(world, web, at, action).await;
    let mut counts = world.counts.lock().unwrap();
    let Ok(answer) = answer else {
        counts.unanswered += 1;
        return true;
    };
    counts.answers += 1;
    let mut files = world.files.lock().unwrap();
    let file = &mut files[at];
    if let Some(nth) = file.begun.iter().position(|begun| *begun == action) {
        file.begun.remove(nth);
    }
    match judge(file, action, &answer, &mut counts) {
        Ok(true) => {}
        Ok(false) => {
            counts.later += 1;
            file.todo.push_front(action);
        }
        Err(wrong) => {
            let text = String::from_utf8_lossy(&answer.body[..answer.body.len().min(400)]).into_owned();
            world.blame(format!("{} {action:?}: {wrong}: {} {text}", file.id, answer.status));
        }
    }
    false
}

async fn send(world: &World, web: &Web, at: usize, action: Action) -> Result<Answer, reqwest::Error> {
    let (id, size, body, values) = {
        let files = world.files.lock().unwrap();
        let file = &files[at];
        let (start, count) = match action {
            Action::Put { start, count, .. } => (start, count),
            Action::PutWrong { chunk, .. } => (chunk, 1),
            Action::Whole { .. } => (0, file.chunks()),
            Action::Create { .. } | Action::Await { .. } | Action::Read { .. } | Action::Delete { .. } => {
                (0, 0)
            }
        };
        let values = file.values[start as usize..(start + count) as usize].join(",");
        (file.id, file.bytes.len(), file.run(start, count), values)
    };
    match action {
        Action::Create { dc } => {
            web.create(dc, json!({ "id": id, "size": size, "name": "x" }).to_string()).await
        }
        Action::Whole { dc } => {
            web.create_whole(dc, json!({ "id": id, "name": "x" }).to_string(), body).await
        }
        Action::Put { dc, start, .. } => {
            // Half of the clients announce what they send.
            let headers = if start % 2 == 0 { vec![] } else { vec![("chunk-value", values)] };
            web.ask(dc, Method::PUT, id, &format!("/chunks/{start}"), &headers, body).await
        }
        Action::PutWrong { dc, chunk } => {
            let wrong: Vec<u8> = body.iter().map(|byte| byte ^ 1).collect();
            let headers = [("chunk-value", values)];
            web.ask(dc, Method::PUT, id, &format!("/chunks/{chunk}"), &headers, wrong).await
        }
        Action::Await { dc } => web.ask(dc, Method::GET, id, "?wait=assembled&timeout=2", &[], "").await,
        Action::Read { dc } => web.ask(dc, Method::GET, id, "/content", &[], "").await,
        Action::Delete { dc, .. } => web.ask(dc, Method::DELETE, id, "", &[], "").await,
    }
}

/// Whether an action is done with this answer, or to be asked again; an error if the answer must not be.
fn judge(file: &mut File, action: Action, answer: &Answer, counts: &mut Counts) -> Result<bool, String> {
    if answer.passes() {
        return Ok(false);
    }
    if answer.status == StatusCode::GONE {
        return if file.ending { Ok(true) } else { Err("nobody ended it".into()) };
    }
    let ok = answer.status.is_success();
    match action {
        Action::Create { dc } if ok => {
            let status: FileStatus = answer.json()?;
            file.created.insert(dc);
            if status.size == Some(file.bytes.len() as u64) { Ok(true) } else { Err("another size".into()) }
        }
        Action::Whole { dc } if ok => {
            let status: FileStatus = answer.json()?;
            file.created.insert(dc);
            file.acknowledged.extend((0..file.chunks()).map(|chunk| (dc, chunk)));
            counts.whole += 1;
            if status.size == Some(file.bytes.len() as u64) { Ok(true) } else { Err("another size".into()) }
        }
        Action::Put { dc, start, count } if ok => {
            let receipt: ChunkReceipt = answer.json()?;
            let expected = &file.values[start as usize..(start + count) as usize];
            if receipt.dc != NAMES[dc] || receipt.start != start || receipt.values != *expected {
                return Err("the receipt is of something else".into());
            }
            file.acknowledged.extend((start..start + count).map(|chunk| (dc, chunk)));
            counts.acknowledged_chunks += count;
            counts.provisional_chunks += if receipt.provisional { count } else { 0 };
            Ok(true)
        }
        Action::PutWrong { .. } if !ok && answer.status.is_client_error() => Ok(true),
        Action::Await { .. } if ok => {
            let status: FileStatus = answer.json()?;
            counts.assembled += u64::from(status.state == State::Assembled);
            match status.state {
                State::Assembled => Ok(true),
                State::Receiving | State::Complete => Ok(false),
                State::Conflict | State::Dropped => Err("it is to be assembled".into()),
            }
        }
        // This datacenter has not heard yet that all is there.
        Action::Read { .. } if answer.status == StatusCode::CONFLICT => Ok(false),
        Action::Read { .. } if ok => {
            counts.read += 1;
            if answer.body == file.bytes { Ok(true) } else { Err("other bytes".into()) }
        }
        Action::Delete { dc, .. } if ok => {
            counts.deleted += 1;
            file.ended.insert(dc);
            Ok(true)
        }
        Action::Create { .. }
        | Action::Whole { .. }
        | Action::Put { .. }
        | Action::PutWrong { .. }
        | Action::Await { .. }
        | Action::Read { .. }
        | Action::Delete { .. } => Err("an answer that must not be".into()),
    }
}
