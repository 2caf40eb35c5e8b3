/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// Guest is the inside of one pod: its images and the writable layers of its
// containers. Its methods may be called concurrently.
type Guest struct {
	dir   string
	pause Pause
	store *store
	// initData is what the pod's init data configures; nil without.
	initData atomic.Pointer[cdh]
}

// Pause is the program that a sandbox runs.
type Pause struct {
	// Program is its path, and Name what it is called by inside of the
	// sandbox.
	Program string
	Name    string
	// Check says why the program cannot be used, if it cannot.
	Check func() error
}

// Request is what the guest needs of a CreateTask request.
type Request struct {
	Namespace string
	ID        string
	// Bundle is the absolute path of the container's bundle.
	Bundle string
	// Rootfs are the mounts that the host asks for.
	Rootfs []mount.Mount
	// Machine is the process that holds the pod's namespaces when the shim made
	// the sandbox by itself, and 0 otherwise.
	Machine int
}

// Container is a container that can be created in the guest.
type Container struct {
	// Rootfs is to be mounted at the bundle's rootfs, inside of the guest's
	// mount namespace.
	Rootfs mount.Mount
	Record Record
}

// New makes a guest whose disk is dir, a file system that vanishes with the
// guest.
func New(dir string, pause Pause) (*Guest, error) {
	s, err := newStore(filepath.Join(dir, "images"))
	if err != nil {
		return nil, fmt.Errorf("make the guest's image store: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "containers"), 0o700); err != nil {
		return nil, fmt.Errorf("make the guest's containers: %w", err)
	}
	return &Guest{dir: dir, pause: pause, store: s}, nil
}

// Prepare reads a request, pulls what it asks for and makes the container's root
// file system. It rewrites the bundle's config.json where the guest decides: the
// path of the root, and the process of a sandbox.
//
// A request that Kata would refuse gives errdefs.ErrInvalidArgument, an image
// that is not the one the host resolved errdefs.ErrFailedPrecondition, one for which
// there is no space errdefs.ErrResourceExhausted, and an ID that is in use
// errdefs.ErrAlreadyExists; after any error nothing of the
// container is left in the guest. After success the caller calls Remove.
func (g *Guest) Prepare(ctx context.Context, cfg Config, req Request) (_ *Container, retErr error) {
	vol, err := checkRootfs(cfg.Flavour, req.Rootfs)
	if err != nil {
		return nil, err
	}
	spec, err := readSpec(req.Bundle)
	if err != nil {
		return nil, err
	}
	annotations := spec.annotations()
	image, err := imageName(annotations)
	if err != nil {
		return nil, err
	}
	// A guest is started with it, so that only its first container has it.
	if v := annotations[AnnotationInitData]; v != "" && (annotations[annotationSandboxID] == "" || annotations[annotationContainerType] == containerTypeSandbox) {
		conf, err := parseInitData(v)
		if err != nil {
			return nil, err
		}
		g.initData.Store(conf)
	}

	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	c := &Container{Record: Record{
		Namespace:      req.Namespace,
		ID:             req.ID,
		SandboxID:      annotations[annotationSandboxID],
		Sandbox:        annotations[annotationContainerType] == containerTypeSandbox,
		Flavour:        cfg.Flavour,
		Mount:          req.Rootfs[0],
		Volume:         vol,
		HostChainID:    mergedMetadata(vol, annotations, volume.MetadataChainID),
		HostManifest:   mergedMetadata(vol, annotations, volume.MetadataManifestDigest),
		HostLayersSize: mergedMetadata(vol, annotations, volume.MetadataLayersSize),
		ShimPID:        os.Getpid(),
		MountNamespace: ns,
	}}

	dir := g.containerDir(req.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		if os.IsExist(err) {
			return nil, fmt.Errorf("container %s: %w", req.ID, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("make a directory for container %s in the guest: %w", req.ID, err)
	}
	defer func() {
		if retErr != nil {
			if err := g.Remove(req.ID); err != nil {
				log.G(ctx).WithError(err).WithField("id", req.ID).Warn("the guest keeps files of a container that it did not create")
			}
		}
	}()

	if c.Record.Sandbox {
		c.Rootfs, err = g.pauseRootfs(dir)
		spec.setProcess("/" + g.pause.Name)
	} else {
		c.Rootfs, err = g.imageRootfs(ctx, cfg, image, dir, &c.Record)
	}
	if err != nil {
		return nil, err
	}
	spec.setRoot(filepath.Join(req.Bundle, "rootfs"))
	if req.Machine != 0 {
		spec.moveNamespaces(os.Getpid(), req.Machine)
	}
	if err := spec.write(); err != nil {
		return nil, err
	}
	return c, nil
}

// imageRootfs pulls an image and puts a writable layer of the container's own on
// top.
func (g *Guest) imageRootfs(ctx context.Context, cfg Config, image, dir string, r *Record) (mount.Mount, error) {
	conf := g.initData.Load()
	if conf == nil && cfg.CDHConfig != "" {
		var err error
		if conf, err = loadCDH(cfg.CDHConfig); err != nil {
			return mount.Mount{}, err
		}
	}
	img, err := g.store.pull(ctx, cfg, conf, image, expected{manifest: r.HostManifest, size: r.HostLayersSize})
	if err != nil {
		return mount.Mount{}, err
	}
	r.Image = &img
	if r.HostChainID != "" && r.HostChainID != img.ChainID {
		err := fmt.Errorf("%w: image %q unpacked in the guest is %s, the host resolved %s",
			errdefs.ErrFailedPrecondition, image, img.ChainID, r.HostChainID)
		if !cfg.IgnoreChainID {
			return mount.Mount{}, err
		}
		log.G(ctx).WithError(err).WithField("id", r.ID).Warn("running it, as ignore_chain_id says")
	}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return mount.Mount{}, fmt.Errorf("make the writable layer of container %s: %w", r.ID, err)
		}
	}
	// The root directory that a container sees is the upper one: it has to
	// look like the image's.
	if err := copyOwnerAndMode(img.root, upper); err != nil {
		return mount.Mount{}, fmt.Errorf("make the writable layer of container %s: %w", r.ID, err)
	}
	return mount.Mount{
		Type:    "overlay",
		Source:  "overlay",
		Options: []string{"lowerdir=" + img.root, "upperdir=" + upper, "workdir=" + work},
	}, nil
}

// pauseRootfs makes a root file system that holds the pause program only. The
// program is bound and not copied: a copy would cost each pod its size in memory.
func (g *Guest) pauseRootfs(dir string) (mount.Mount, error) {
	if err := g.pause.Check(); err != nil {
		return mount.Mount{}, err
	}
	root := filepath.Join(dir, "root")
	program := filepath.Join(root, g.pause.Name)
	if err := os.Mkdir(root, 0o755); err != nil {
		return mount.Mount{}, fmt.Errorf("make the root of the sandbox: %w", err)
	}
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		return mount.Mount{}, fmt.Errorf("make the root of the sandbox: %w", err)
	}
	if err := unix.Mount(g.pause.Program, program, "", unix.MS_BIND, ""); err != nil {
		return mount.Mount{}, fmt.Errorf("bind the pause program: %w", &os.PathError{Op: "mount", Path: program, Err: err})
	}
	return mount.Mount{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}, nil
}

// Remove removes what a container has in the guest; nothing is no error. Its
// root file system is unmounted by then.
func (g *Guest) Remove(id string) error {
	dir := g.containerDir(id)
	if err := mount.UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

func (g *Guest) containerDir(id string) string {
	return filepath.Join(g.dir, "containers", id)
}

func copyOwnerAndMode(from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return &os.PathError{Op: "stat", Path: from, Err: err}
	}
	if err := os.Chown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(to, st.Mode&0o7777)
}
