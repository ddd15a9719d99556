"""A simulated ads world: two surfaces, ads that are born and die, people whose interests drift.

Made up, and called simulated wherever its results appear. docs/simulated.md has the formulas;
`jobs/sources/simulated_world.py` draws it.
"""

from __future__ import annotations

from datetime import timedelta

from feature_store.spec import (
    Aggregate,
    Attribute,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    ItemFeatures,
    Kind,
    SparseFeature,
    Target,
    Task,
    UserAttribute,
)

AD = Attribute(name="ad", vocabulary="item")
CATEGORY = Attribute(name="category")
ADVERTISER = Attribute(name="advertiser")
SURFACE = Attribute(name="surface")  # 0 feed, 1 stories

DATASET = Dataset(
    name="simulated",
    description="A simulated ads world with a known truth: click and conversion on feed and stories.",
    simulated=True,
    first_day="2024-03-01",
    serve_delay=timedelta(hours=1),
    streams=(
        EventStream(
            name="page_likes",
            attributes=(Attribute(name="page"), CATEGORY),
            max_events=48,
            id_from=("user_id", "event_time", "page"),
        ),
        EventStream(
            name="ad_impressions",
            attributes=(AD, CATEGORY, ADVERTISER, SURFACE, Attribute(name="country")),
            max_events=48,
        ),
        EventStream(
            name="ad_clicks",
            attributes=(AD, CATEGORY, ADVERTISER),
            max_events=24,
            id_from=("user_id", "event_time", "ad"),
        ),
        EventStream(
            name="purchases",
            attributes=(AD, CATEGORY, ADVERTISER, Attribute(name="price", kind=Kind.NUMERIC)),
            max_events=12,
            id_from=("user_id", "event_time", "ad"),
        ),
    ),
    targets=(
        Target(
            name="impression",
            context=(
                SURFACE,
                Attribute(name="hour"),
                Attribute(name="position"),  # in the session, from 1
                CATEGORY,
                ADVERTISER,
            ),
        ),
    ),
    user_attributes=(UserAttribute(name="country", stream="ad_impressions", attribute="country"),),
    sparse_features=(
        SparseFeature(
            name="liked_categories_1d",
            stream="page_likes",
            attribute="category",
            window_days=1,
            max_ids=16,
            scored=True,
        ),
        SparseFeature(
            name="liked_categories_7d",
            stream="page_likes",
            attribute="category",
            window_days=7,
            max_ids=16,
            scored=True,
        ),
        SparseFeature(
            name="liked_pages_7d", stream="page_likes", attribute="page", window_days=7, max_ids=32
        ),
        SparseFeature(
            name="clicked_categories_7d",
            stream="ad_clicks",
            attribute="category",
            window_days=7,
            max_ids=16,
            scored=True,
        ),
        SparseFeature(
            name="clicked_ads_3d", stream="ad_clicks", attribute="ad", window_days=3, max_ids=16
        ),
        SparseFeature(
            name="seen_advertisers_1d",
            stream="ad_impressions",
            attribute="advertiser",
            window_days=1,
            max_ids=16,
            scored=True,
        ),
        SparseFeature(
            name="bought_advertisers_7d",
            stream="purchases",
            attribute="advertiser",
            window_days=7,
            max_ids=8,
            scored=True,
        ),
    ),
    dense_features=(
        DenseFeature(
            name="likes_1d", stream="page_likes", aggregate=Aggregate.COUNT, window_days=1
        ),
        DenseFeature(
            name="likes_7d", stream="page_likes", aggregate=Aggregate.COUNT, window_days=7
        ),
        DenseFeature(
            name="impressions_7d", stream="ad_impressions", aggregate=Aggregate.COUNT, window_days=7
        ),
        DenseFeature(
            name="clicks_1d", stream="ad_clicks", aggregate=Aggregate.COUNT, window_days=1
        ),
        DenseFeature(
            name="clicks_7d", stream="ad_clicks", aggregate=Aggregate.COUNT, window_days=7
        ),
        DenseFeature(
            name="ctr_7d",
            stream="ad_clicks",
            aggregate=Aggregate.RATE,
            window_days=7,
            per="ad_impressions",
        ),
        DenseFeature(
            name="purchases_7d", stream="purchases", aggregate=Aggregate.COUNT, window_days=7
        ),
        DenseFeature(
            name="spent_7d",
            stream="purchases",
            aggregate=Aggregate.SUM,
            window_days=7,
            attribute="price",
        ),
        DenseFeature(
            name="purchase_rate_7d",
            stream="purchases",
            aggregate=Aggregate.RATE,
            window_days=7,
            per="ad_clicks",
        ),
        DenseFeature(
            name="hours_since_like", stream="page_likes", aggregate=Aggregate.RECENCY, window_days=7
        ),
        DenseFeature(
            name="hours_since_click", stream="ad_clicks", aggregate=Aggregate.RECENCY, window_days=7
        ),
    ),
    item_features=ItemFeatures(
        streams=(("ad_impressions", "ad"), ("ad_clicks", "ad")), windows_hours=(6, 24)
    ),
    domain="surface",
    tasks=(
        Task(
            name="click",
            label=GivenLabel(column="clicked"),
            targets=("impression",),
            description="The ad shown is clicked.",
        ),
        Task(
            name="conversion",
            label=EventLabel(
                stream="purchases", within=timedelta(hours=24), match=(("item_id", "ad"),)
            ),
            targets=("impression",),
            matures_after=1,
            description="The ad shown is clicked and its product bought within 24 hours.",
        ),
    ),
)
