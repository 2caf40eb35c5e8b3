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
	"context"
	"os"
	"sync"

	cgroups "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	ptypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// idleTasks answers for containers of a guest that does nothing, and passes on what is
// about any other one. They exist in this process only: containerd's restarts are no
// matter to them, its own end is theirs.
type idleTasks struct {
	taskAPI.TTRPCTaskService

	mu   sync.Mutex
	idle map[string]*idleTask
}

type idleTask struct {
	status   tasktypes.Status // guarded by idleTasks.mu, as all but exited
	code     uint32
	exitedAt *timestamppb.Timestamp
	exited   chan struct{}
}

func (i *idleTasks) createIdle(id string) *taskAPI.CreateTaskResponse {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.idle == nil {
		i.idle = map[string]*idleTask{}
	}
	i.idle[id] = &idleTask{status: tasktypes.Status_CREATED, exited: make(chan struct{})}
	return &taskAPI.CreateTaskResponse{Pid: uint32(os.Getpid())}
}

// of calls f with an idle container, and returns false if there is none of that ID.
func (i *idleTasks) of(id string, f func(*idleTask)) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.idle[id]
	if t == nil {
		return false
	}
	f(t)
	return true
}

func (i *idleTasks) Start(ctx context.Context, r *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	if i.of(r.ID, func(t *idleTask) { t.status = tasktypes.Status_RUNNING }) {
		return &taskAPI.StartResponse{Pid: uint32(os.Getpid())}, nil
	}
	return i.TTRPCTaskService.Start(ctx, r)
}

func (i *idleTasks) State(ctx context.Context, r *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	resp := &taskAPI.StateResponse{ID: r.ID, Pid: uint32(os.Getpid())}
	if i.of(r.ID, func(t *idleTask) { resp.Status, resp.ExitStatus, resp.ExitedAt = t.status, t.code, t.exitedAt }) {
		return resp, nil
	}
	return i.TTRPCTaskService.State(ctx, r)
}

// Stats reports a little of everything, as containerd answers kubelet from it.
func (i *idleTasks) Stats(ctx context.Context, r *taskAPI.StatsRequest) (*taskAPI.StatsResponse, error) {
	if !i.of(r.ID, func(*idleTask) {}) {
		return i.TTRPCTaskService.Stats(ctx, r)
	}
	stats, err := typeurl.MarshalAnyToProto(&cgroups.Metrics{
		CPU:    &cgroups.CPUStat{UsageUsec: 1},
		Memory: &cgroups.MemoryStat{Usage: 1, UsageLimit: 2},
		Pids:   &cgroups.PidsStat{Current: 1},
	})
	return &taskAPI.StatsResponse{Stats: stats}, err
}

func (i *idleTasks) Kill(ctx context.Context, r *taskAPI.KillRequest) (*ptypes.Empty, error) {
	if i.of(r.ID, func(t *idleTask) {
		if t.exitedAt == nil {
			t.status, t.code, t.exitedAt = tasktypes.Status_STOPPED, 128+uint32(unix.SIGKILL), timestamppb.Now()
			close(t.exited)
		}
	}) {
		return &ptypes.Empty{}, nil
	}
	return i.TTRPCTaskService.Kill(ctx, r)
}

func (i *idleTasks) Wait(ctx context.Context, r *taskAPI.WaitRequest) (*taskAPI.WaitResponse, error) {
	var task *idleTask
	if !i.of(r.ID, func(t *idleTask) { task = t }) {
		return i.TTRPCTaskService.Wait(ctx, r)
	}
	select {
	case <-task.exited:
		return &taskAPI.WaitResponse{ExitStatus: task.code, ExitedAt: task.exitedAt}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (i *idleTasks) Delete(ctx context.Context, r *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	resp := &taskAPI.DeleteResponse{Pid: uint32(os.Getpid())}
	if i.of(r.ID, func(t *idleTask) {
		resp.ExitStatus, resp.ExitedAt = t.code, t.exitedAt
		delete(i.idle, r.ID)
	}) {
		return resp, nil
	}
	return i.TTRPCTaskService.Delete(ctx, r)
}

func (i *idleTasks) Shutdown(ctx context.Context, r *taskAPI.ShutdownRequest) (*ptypes.Empty, error) {
	i.mu.Lock()
	some := len(i.idle) > 0
	i.mu.Unlock()
	if some {
		return &ptypes.Empty{}, nil
	}
	return i.TTRPCTaskService.Shutdown(ctx, r)
}
