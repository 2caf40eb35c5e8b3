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

package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
)

// What the tests of made up images are told.
const (
	// shapesEnv is how many are tried; without it as many as fit into
	// shapesTime.
	shapesEnv = "GUEST_PULL_SHAPES"
	// shapeEnv is one case, as a failed test prints it, which is tried alone.
	shapeEnv = "GUEST_PULL_SHAPE"

	shapesTime = 110 * time.Second
	// Cases that are tried on one node, after which it has to be empty.
	shapesOnNode = 40
)

// A host that fetches nothing but manifests and configs, whatever image it is
// given, and pods that run or say at once why not, whatever came before them: made
// up images in the hands of made up pods. The registry's log is the judge of what
// was fetched; a node with stock containerd is the judge of pods on the host.
//
// A case that fails is printed, as small as it could be made, and tried alone with
// GUEST_PULL_SHAPE. GUEST_PULL_SEED repeats a run.
func TestShapes(t *testing.T) {
	skipShapes(t)
	if one := os.Getenv(shapeEnv); one != "" {
		var c shapeCase
		require.NoError(t, json.Unmarshal([]byte(one), &c))
		require.NoError(t, tryAlone(t.Context(), c))
		return
	}
	limit, deadline := int64(envNumber(t, shapesEnv, 0)), time.Now().Add(24*time.Hour)
	if limit == 0 {
		limit, deadline = math.MaxInt64, time.Now().Add(shapesTime)
	}
	seed := envNumber(t, "GUEST_PULL_SEED", rand.Uint64())
	t.Logf("repeat with GUEST_PULL_SEED=%d", seed)
	var (
		tried   atomic.Int64
		workers sync.WaitGroup
	)
	for i, conf := range []shapeNode{{}, {LocalPull: true}, {Discard: true}, {LocalPull: true, Discard: true}} {
		workers.Go(func() {
			for batch := uint64(0); tried.Load() < limit && time.Now().Before(deadline); batch++ {
				m := maker{rand.New(rand.NewPCG(seed, uint64(i)<<32|batch))}
				conf.DisableLayerFetch, conf.RuncFirst, conf.Pause = m.oneIn(2), m.oneIn(2), m.pause()
				cases := m.cases(conf, shapesOnNode)
				if c, err := tryAll(t.Context(), cases, func() bool { return tried.Add(1) <= limit && time.Now().Before(deadline) }); err != nil {
					t.Logf("%v\nin %s, which is made smaller now", err, c)
					smaller, err := shrink(t.Context(), c, err)
					t.Errorf("%v\nthe smallest case that fails so, to be tried with %s='%s'\nmade of %s", err, shapeEnv, smaller, c)
					return
				}
			}
		})
	}
	workers.Wait()
}

// tryAll tries cases on one node, one after the other, for as long as more says. If
// one fails, it is returned as well.
func tryAll(ctx context.Context, cases []shapeCase, more func() bool) (shapeCase, error) {
	n, err := newShapesNode(ctx, cases[0].Node)
	if err != nil {
		return shapeCase{Node: cases[0].Node}, err
	}
	for _, c := range cases {
		if !more() {
			break
		}
		if err := n.try(ctx, c); err != nil {
			if os.Getenv(shapeEnv) != "" {
				fmt.Println(n.node.LogTail(100))
			}
			return c, errors.Join(err, n.shutDown())
		}
		if err := figures.Add(figures.Shapes, 1); err != nil {
			return c, err
		}
	}
	return cases[len(cases)-1], n.close(ctx)
}

// tryAlone tries a case on a node of its own.
func tryAlone(ctx context.Context, c shapeCase) error {
	_, err := tryAll(ctx, []shapeCase{c}, func() bool { return true })
	return err
}

// shapeError is an error of a kind: another case with one of the same kind fails
// so.
type shapeError struct {
	kind   string
	detail error
}

func (e *shapeError) Error() string { return e.kind + ": " + e.detail.Error() }

func kindOf(err error) string {
	var s *shapeError
	if errors.As(err, &s) {
		return s.kind
	}
	return "other"
}

// shrinkTime bounds the search for a smaller case.
const shrinkTime = 5 * time.Minute

// shrink returns a case that fails so and has nothing that can be left out, each
// with a node of its own.
func shrink(ctx context.Context, c shapeCase, err error) (shapeCase, error) {
	kind, deadline := kindOf(err), time.Now().Add(shrinkTime)
	if alone := tryAlone(ctx, c); alone == nil || kindOf(alone) != kind {
		return c, fmt.Errorf("%w\n(only after the cases before it; alone: %s)", err, fmt.Sprint(alone))
	}
	for smaller := true; smaller; {
		smaller = false
		for _, candidate := range simpler(c) {
			if time.Now().After(deadline) {
				return c, err
			}
			if e := tryAlone(ctx, candidate); e != nil && kindOf(e) == kind {
				c, err, smaller = candidate, e, true
				break
			}
		}
	}
	return c, err
}

// simpler returns the cases that have one thing less.
func simpler(c shapeCase) (cases []shapeCase) {
	for i := range c.Pods {
		s := c
		s.Pods = slices.Delete(slices.Clone(c.Pods), i, i+1)
		cases = append(cases, s)
	}
	zero := func(of func(*shapeCase) reflect.Value) {
		for i := range of(&c).NumField() {
			s := c
			s.Pods = slices.Clone(c.Pods)
			f := of(&s).Field(i)
			if f.IsZero() || f.Type() == reflect.TypeFor[[]shapePod]() {
				continue
			}
			old := reflect.ValueOf(f.Interface())
			f.SetZero()
			cases = append(cases, s)
			if f.Kind() == reflect.Int && old.Int() > 1 {
				f.SetInt(old.Int() / 2)
				cases = append(cases, s)
			}
		}
	}
	zero(func(s *shapeCase) reflect.Value { return reflect.ValueOf(s).Elem() })
	zero(func(s *shapeCase) reflect.Value { return reflect.ValueOf(&s.Node).Elem() })
	zero(func(s *shapeCase) reflect.Value { return reflect.ValueOf(&s.Node.Pause).Elem() })
	zero(func(s *shapeCase) reflect.Value { return reflect.ValueOf(&s.Image).Elem() })
	for i := range c.Pods {
		zero(func(s *shapeCase) reflect.Value { return reflect.ValueOf(&s.Pods[i]).Elem() })
	}
	return cases
}
