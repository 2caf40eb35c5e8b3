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

package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ptypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.TTRPCPlugin,
		ID:   "task",
		Requires: []plugin.Type{
			plugins.EventPlugin,
			plugins.InternalPlugin,
		},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			dir, err := insideGuest()
			if err != nil {
				return nil, err
			}
			self, err := os.Executable()
			if err != nil {
				return nil, err
			}
			g, err := guest.New(dir, guest.Pause{
				Program: self,
				Name:    pauseName,
				Check:   func() error { return checkStatic(self) },
			})
			if err != nil {
				return nil, err
			}
			pp, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			ss, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			inner, err := task.NewTaskService(ic.Context, pp.(shim.Publisher), ss.(shutdown.Service))
			if err != nil {
				return nil, err
			}
			s := &service{TTRPCTaskService: &idleTasks{TTRPCTaskService: inner}, guest: g, containers: map[string]struct{}{}}
			s.sandbox = newSandbox(ss.(shutdown.Service), s.killAll)
			return s, nil
		},
	})
}

// service is the runc shim's task service on the other side of a guest: what
// reaches the embedded Create are the mounts of the guest.
type service struct {
	taskAPI.TTRPCTaskService
	guest   *guest.Guest
	sandbox *sandbox

	mu         sync.Mutex
	containers map[string]struct{} // that were created and not deleted
}

// RegisterTTRPC makes the shim serve this service and not the embedded one, and the
// sandbox API.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskAPI.RegisterTTRPCTaskService(server, s)
	return s.sandbox.RegisterTTRPC(server)
}

// Create pulls the container's image in the guest and creates the container
// there. A request that Kata would refuse gives InvalidArgument.
func (s *service) Create(ctx context.Context, r *taskAPI.CreateTaskRequest) (_ *taskAPI.CreateTaskResponse, retErr error) {
	cfg, runcOptions, err := config(r)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	sandboxID, sandboxConfig, machine := s.sandbox.own()
	if sandboxID != "" {
		cfg = sandboxConfig
	}
	if cfg.Idle {
		return s.TTRPCTaskService.(*idleTasks).createIdle(r.ID), nil
	}
	if r.Options, err = typeurl.MarshalAnyToProto(runcOptions); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	req := guest.Request{
		Namespace: ns,
		ID:        r.ID,
		Bundle:    r.Bundle,
		Machine:   machine,
	}
	for _, m := range r.Rootfs {
		req.Rootfs = append(req.Rootfs, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	c, err := s.guest.Prepare(ctx, cfg, req)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("stand-in guest: %w", err))
	}
	defer func() {
		if retErr != nil {
			s.remove(ctx, r.ID)
		}
	}()

	r.Rootfs = []*types.Mount{{
		Type:    c.Rootfs.Type,
		Source:  c.Rootfs.Source,
		Options: c.Rootfs.Options,
	}}
	resp, err := s.TTRPCTaskService.Create(ctx, r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.containers[r.ID] = struct{}{}
	s.mu.Unlock()
	if err := c.Record.Write(cfg.RecordDir); err != nil {
		log.G(ctx).WithError(err).WithField("id", r.ID).Error("the record of a container is missing")
	}
	return resp, nil
}

// Delete deletes a process and, with the container's own, what the container has
// in the guest.
func (s *service) Delete(ctx context.Context, r *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	resp, err := s.TTRPCTaskService.Delete(ctx, r)
	if err == nil && r.ExecID == "" {
		s.remove(ctx, r.ID)
	}
	return resp, err
}

// Connect and State answer for a sandbox without a container of its own as the Rust
// shim does (src/runtime-rs/crates/runtimes/virt_container/src/container_manager/manager.rs,
// connect_container and state_process): containerd asks when it starts again.
func (s *service) Connect(ctx context.Context, r *taskAPI.ConnectRequest) (*taskAPI.ConnectResponse, error) {
	if id, _, _ := s.sandbox.own(); id != "" && id == r.ID {
		return &taskAPI.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: uint32(os.Getpid())}, nil
	}
	return s.TTRPCTaskService.Connect(ctx, r)
}

func (s *service) State(ctx context.Context, r *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	if id, _, _ := s.sandbox.own(); id != "" && id == r.ID {
		return &taskAPI.StateResponse{ID: id, Pid: uint32(os.Getpid()), Status: tasktypes.Status_RUNNING}, nil
	}
	return s.TTRPCTaskService.State(ctx, r)
}

// Shutdown ends a shim without containers, but not one with a sandbox: that ends
// by the sandbox API.
func (s *service) Shutdown(ctx context.Context, r *taskAPI.ShutdownRequest) (*ptypes.Empty, error) {
	if id, _, _ := s.sandbox.own(); id != "" {
		return &ptypes.Empty{}, nil
	}
	return s.TTRPCTaskService.Shutdown(ctx, r)
}

// killAll kills the containers of a machine that has ended.
func (s *service) killAll(ctx context.Context) {
	s.mu.Lock()
	ids := slices.Collect(maps.Keys(s.containers))
	s.mu.Unlock()
	for _, id := range ids {
		if _, err := s.Kill(ctx, &taskAPI.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}); err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			log.G(ctx).WithError(err).WithField("id", id).Warn("a container outlives its machine")
		}
	}
}

func (s *service) remove(ctx context.Context, id string) {
	s.mu.Lock()
	delete(s.containers, id)
	s.mu.Unlock()
	if err := s.guest.Remove(id); err != nil {
		log.G(ctx).WithError(err).WithField("id", id).Warn("the guest keeps files of a removed container")
	}
}

// config returns the guest's configuration for a request, and the options for
// runc. The configuration is in the file that the runtime options name as Kata's
// do (ConfigPath), or else in the one that the environment of containerd names.
// The runc shim knows its own kind of options only.
func config(r *taskAPI.CreateTaskRequest) (guest.Config, *options.Options, error) {
	path := os.Getenv(guest.ConfigEnv)
	runcOptions := &options.Options{}
	if r.Options.GetValue() != nil {
		v, err := typeurl.UnmarshalAny(r.Options)
		if err != nil {
			return guest.Config{}, nil, fmt.Errorf("read the runtime options: %w: %w", errdefs.ErrInvalidArgument, err)
		}
		switch o := v.(type) {
		case *options.Options:
			runcOptions = o
		case *runtimeoptions.Options:
			if o.ConfigPath == "" && len(bytes.TrimSpace(o.ConfigBody)) > 0 {
				return guest.Config{}, nil, fmt.Errorf("runtime options: %w: the only one known is ConfigPath", errdefs.ErrInvalidArgument)
			}
			if o.ConfigPath != "" {
				path = o.ConfigPath
			}
		default:
			return guest.Config{}, nil, fmt.Errorf("runtime options of type %T: %w", v, errdefs.ErrInvalidArgument)
		}
	}
	cfg, err := guest.LoadConfig(path)
	if err != nil {
		return guest.Config{}, nil, err
	}
	if runcOptions.Root == "" {
		runcOptions.Root = cfg.RuncRoot
	}
	runcOptions.SystemdCgroup = runcOptions.SystemdCgroup || cfg.SystemdCgroup
	return cfg, runcOptions, nil
}
