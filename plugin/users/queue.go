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

package users

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DefaultConcurrency is how many images are read at once, if nothing is
// configured: what one of them may cost, maxMemory and a few windows of maxWindow,
// is to be nothing to a small node.
const DefaultConcurrency = 2

// Whoever pushes an image chooses the registry too, and a registry can take its
// time. So each wait for another image has an end, and an image that comes in
// slowly gives way when others wait.
const (
	maxWait   = 2 * time.Minute  // for a turn; the pull fails then, and is tried again
	maxShared = 30 * time.Second // for somebody who reads the same image
	maxIdle   = 30 * time.Second // without a byte
	grace     = 30 * time.Second // that an image is read undisturbed
	minRate   = 1 << 20          // bytes fetched per second, by which it is slow
)

// queue lets a few images be read at once.
type queue struct {
	turns                            *semaphore.Weighted
	size                             int
	maxWait, maxIdle, grace, between time.Duration

	mu     sync.Mutex
	active map[*turn]struct{}
}

// turn is an image that is read now.
type turn struct {
	start   time.Time
	fetched atomic.Int64
	cancel  context.CancelCauseFunc
	idle    *time.Timer
	maxIdle time.Duration
}

func newQueue(size int) *queue {
	return &queue{
		turns: semaphore.NewWeighted(int64(size)), size: size, active: map[*turn]struct{}{},
		maxWait: maxWait, maxIdle: maxIdle, grace: grace, between: time.Second,
	}
}

// take waits for a turn. The context that it returns ends with the turn: by done,
// when nothing comes in any more, or when the image is slow and others wait.
func (q *queue) take(ctx context.Context) (_ context.Context, _ *turn, done func(), _ error) {
	wait, stop := context.WithTimeoutCause(ctx, q.maxWait,
		fmt.Errorf("the users of %d other images were read all the time for %s: %w", q.size, q.maxWait, errdefs.ErrUnavailable))
	defer stop()
	if !q.turns.TryAcquire(1) {
		hurry := time.NewTicker(q.between)
		defer hurry.Stop()
		go func() {
			for {
				select {
				case <-hurry.C:
					q.hurry()
				case <-wait.Done():
					return
				}
			}
		}()
		if q.turns.Acquire(wait, 1) != nil {
			return nil, nil, nil, context.Cause(wait)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	t := &turn{start: time.Now(), cancel: cancel, maxIdle: q.maxIdle, idle: time.AfterFunc(q.maxIdle, func() {
		cancel(fmt.Errorf("the registry sent nothing for %s: %w", q.maxIdle, errdefs.ErrUnavailable))
	})}
	q.mu.Lock()
	q.active[t] = struct{}{}
	q.mu.Unlock()
	return ctx, t, func() {
		q.mu.Lock()
		delete(q.active, t)
		q.mu.Unlock()
		t.idle.Stop()
		cancel(context.Canceled)
		q.turns.Release(1)
	}, nil
}

// hurry ends the turn of the image that has come in most slowly, if it is slow.
func (q *queue) hurry() {
	q.mu.Lock()
	defer q.mu.Unlock()
	var slowest *turn
	rate := float64(minRate)
	for t := range q.active {
		held := time.Since(t.start)
		if r := float64(t.fetched.Load()) / held.Seconds(); held > q.grace && r < rate {
			slowest, rate = t, r
		}
	}
	if slowest != nil {
		slowest.cancel(fmt.Errorf("its layers come in with %.0f bytes a second, and others wait: %w", rate, errdefs.ErrUnavailable))
		delete(q.active, slowest)
	}
}

// errRefused is the error of a fetch that the node's configuration forbids: the
// runtime handler of the pull has disable_layer_fetch (patches/containerd, 0007).
// It is one of the opening of a layer; a registry cannot make it.
var errRefused = errors.New("refused")

// counted counts what is fetched.
func (t *turn) counted(fetch Fetch) Fetch {
	return func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		r, err := fetch(ctx, desc)
		switch {
		case errdefs.IsFailedPrecondition(err):
			return nil, fmt.Errorf("%w: %w", errRefused, err)
		case err != nil:
			return nil, errors.Join(context.Cause(ctx), err)
		}
		// Whatever the registry's client makes of its context.
		stop := context.AfterFunc(ctx, func() { r.Close() })
		return &countedReader{r, t, stop}, nil
	}
}

type countedReader struct {
	io.ReadCloser
	turn *turn
	stop func() bool
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.turn.fetched.Add(int64(n))
	if n > 0 {
		r.turn.idle.Reset(r.turn.maxIdle)
	}
	return n, err
}

func (r *countedReader) Close() error {
	if r.stop() {
		return r.ReadCloser.Close()
	}
	return nil // was closed when the context ended
}
