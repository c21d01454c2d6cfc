//! A disk that fails, shown to a whole process as a filesystem (FUSE, without libfuse).
//!
//! The kernel caches nothing of it: every read, write, sync and name comes to the [`FaultDisk`]. One thread of the
//! session answers, until the kernel has let go of the mount.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use sluice_fault_disk::{FaultDisk, Node, PAGE};

/// The kernel asks again each time.
const NEVER: Duration = Duration::ZERO;

/// A mounted disk. Dropping it takes the mount away.
///
/// Nobody waits for the session's thread: whoever makes a mount name space meanwhile, as `ip netns exec` does, has a mount of
/// its own there, and the kernel lets go only when that ends.
pub(crate) struct Mount {
    _session: BackgroundSession,
}

impl Mount {
    /// Mounts a disk at an empty directory.
    pub(crate) fn on(path: &Path, disk: &FaultDisk) -> io::Result<Self> {
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("sluice-fault-disk".into()), MountOption::NoAtime];
        Ok(Self { _session: fuser::spawn_mount(Faulty(disk.clone()), path, &config)? })
    }
}

struct Faulty(FaultDisk);

/// What the kernel is told of an error.
fn errno(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::NotFound => Errno::ENOENT,
        io::ErrorKind::NotADirectory => Errno::ENOTDIR,
        io::ErrorKind::IsADirectory => Errno::EISDIR,
        io::ErrorKind::DirectoryNotEmpty => Errno::ENOTEMPTY,
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        _ => Errno::EIO,
    }
}

fn attributes(node: Node) -> FileAttr {
    let (kind, perm, nlink) =
        if node.is_dir { (FileType::Directory, 0o700, 2) } else { (FileType::RegularFile, 0o600, 1) };
    FileAttr {
        ino: INodeNo(node.id),
        size: node.len,
        blocks: node.pages * (PAGE as u64 / 512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        rdev: 0,
        flags: 0,
        blksize: PAGE as u32,
    }
}

fn text(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

fn entry(result: io::Result<Node>, reply: ReplyEntry) {
    match result {
        Ok(node) => reply.entry(&NEVER, &attributes(node), Generation(0)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn done(result: io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

impl Filesystem for Faulty {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.0.child(parent.0, &text(name)), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.node(ino.0) {
            Ok(node) => reply.attr(&NEVER, &attributes(node)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let cut = size.map_or(Ok(()), |size| self.0.set_len(ino.0, size));
        match cut.and_then(|()| self.0.node(ino.0)) {
            Ok(node) => reply.attr(&NEVER, &attributes(node)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        entry(self.0.make_dir(parent.0, &text(name)), reply);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.0.make_file(parent.0, &text(name)) {
            Ok(node) => {
                let flags = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&NEVER, &attributes(node), Generation(0), FileHandle(0), flags);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.0.unlink(parent.0, &text(name)), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.0.unlink_dir(parent.0, &text(name)), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        to_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        done(self.0.rename_child((parent.0, &text(name)), (to.0, &text(to_name))), reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.read(ino.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.write(ino.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.0.sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.0.sync_names(ino.0), reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let children = match self.0.children(ino.0) {
            Ok(children) => children,
            Err(error) => return reply.error(errno(&error)),
        };
        // Offsets are nodes' numbers, so that names that go meanwhile do not move the others.
        let mut nodes: Vec<_> = children.into_iter().filter(|(_, node)| node.id > offset).collect();
        nodes.sort_by_key(|(_, node)| node.id);
        for (name, node) in nodes {
            let kind = if node.is_dir { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(node.id), node.id, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.0.room() {
            Ok((all, free)) => reply.statfs(all, free, free, 0, 0, PAGE as u32, 255, PAGE as u32),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        done(self.0.reserve(ino.0, offset + length), reply);
    }
}
